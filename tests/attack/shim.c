// Makes the n-th system call of one kind fail, for calls on paths that contain a given word.
// Built by faults.py and loaded with LD_PRELOAD; armed through ctypes once all else is set up.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char kind[32], word[256];
static int nth, code, lasting, shorten;
static int count;

// error 0: no failure. lasting: every call from the n-th on. shorten: half of what is asked for.
void shim_arm(const char* kind_, const char* word_, int nth_, int code_, int lasting_, int half) {
  snprintf(kind, sizeof kind, "%s", kind_);
  snprintf(word, sizeof word, "%s", word_);
  nth = nth_, code = code_, lasting = lasting_, shorten = half, count = 0;
}

int shim_count(void) { return count; }

static int ours(const char* path, int fd) {
  char link[64], target[4096];
  if (path && strstr(path, word)) return 1;
  if (path && path[0] == '/') return 0;
  if (fd < 0) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t n = readlink(link, target, sizeof target - 1);
  if (n < 0) return 0;
  target[n] = 0;
  return strstr(target, word) != 0;
}

static int fails(const char* what, const char* path, int fd) {
  if (!kind[0] || strcmp(what, kind) || !ours(path, fd)) return 0;
  int now = __atomic_add_fetch(&count, 1, __ATOMIC_SEQ_CST);
  if (shorten || !code || !(now == nth || (lasting && now > nth))) return 0;
  errno = code;
  return 1;
}

static size_t share(const char* what, int fd, size_t n) {
  return shorten && !strcmp(what, kind) && ours(0, fd) && n > 1 ? n / 2 : n;
}

#define REAL(type, name, ...)                            \
  static type (*real)(__VA_ARGS__);                      \
  if (!real) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

ssize_t write(int fd, const void* data, size_t n) {
  REAL(ssize_t, "write", int, const void*, size_t);
  return fails("write", 0, fd) ? -1 : real(fd, data, share("write", fd, n));
}
ssize_t pwrite64(int fd, const void* data, size_t n, off64_t at) {
  REAL(ssize_t, "pwrite64", int, const void*, size_t, off64_t);
  return fails("write", 0, fd) ? -1 : real(fd, data, share("write", fd, n), at);
}
ssize_t read(int fd, void* data, size_t n) {
  REAL(ssize_t, "read", int, void*, size_t);
  return fails("read", 0, fd) ? -1 : real(fd, data, share("read", fd, n));
}
ssize_t pread64(int fd, void* data, size_t n, off64_t at) {
  REAL(ssize_t, "pread64", int, void*, size_t, off64_t);
  return fails("read", 0, fd) ? -1 : real(fd, data, share("read", fd, n), at);
}
ssize_t preadv64v2(int fd, const struct iovec* v, int n, off64_t at, int flags) {
  REAL(ssize_t, "preadv64v2", int, const struct iovec*, int, off64_t, int);
  return fails("read", 0, fd) ? -1 : real(fd, v, n, at, flags);
}
ssize_t preadv64(int fd, const struct iovec* v, int n, off64_t at) {
  REAL(ssize_t, "preadv64", int, const struct iovec*, int, off64_t);
  return fails("read", 0, fd) ? -1 : real(fd, v, n, at);
}
int open64(const char* path, int flags, ...) {
  REAL(int, "open64", const char*, int, ...);
  va_list more;
  va_start(more, flags);
  mode_t mode = va_arg(more, mode_t);
  va_end(more);
  return fails("open", path, AT_FDCWD) ? -1 : real(path, flags, mode);
}
int openat64(int at, const char* path, int flags, ...) {
  REAL(int, "openat64", int, const char*, int, ...);
  va_list more;
  va_start(more, flags);
  mode_t mode = va_arg(more, mode_t);
  va_end(more);
  return fails("open", path, at) ? -1 : real(at, path, flags, mode);
}
int close(int fd) {
  REAL(int, "close", int);
  // The descriptor is gone, as after a real failure of close.
  if (fails("close", 0, fd)) {
    int kept = errno;
    real(fd);
    errno = kept;
    return -1;
  }
  return real(fd);
}
int fsync(int fd) {
  REAL(int, "fsync", int);
  return fails("fsync", 0, fd) ? -1 : real(fd);
}
int mkdir(const char* path, mode_t mode) {
  REAL(int, "mkdir", const char*, mode_t);
  return fails("mkdir", path, AT_FDCWD) ? -1 : real(path, mode);
}
int rename(const char* from, const char* to) {
  REAL(int, "rename", const char*, const char*);
  return fails("rename", from, AT_FDCWD) ? -1 : real(from, to);
}
int renameat2(int a, const char* from, int b, const char* to, unsigned flags) {
  REAL(int, "renameat2", int, const char*, int, const char*, unsigned);
  return fails("renameat2", from, a) ? -1 : real(a, from, b, to, flags);
}
int unlink(const char* path) {
  REAL(int, "unlink", const char*);
  return fails("unlink", path, AT_FDCWD) ? -1 : real(path);
}
int unlinkat(int at, const char* path, int flags) {
  REAL(int, "unlinkat", int, const char*, int);
  return fails("unlink", path, at) ? -1 : real(at, path, flags);
}
int rmdir(const char* path) {
  REAL(int, "rmdir", const char*);
  return fails("rmdir", path, AT_FDCWD) ? -1 : real(path);
}
int flock(int fd, int how) {
  REAL(int, "flock", int, int);
  return fails("flock", 0, fd) ? -1 : real(fd, how);
}
int stat64(const char* path, struct stat64* into) {
  REAL(int, "stat64", const char*, struct stat64*);
  return fails("stat", path, AT_FDCWD) ? -1 : real(path, into);
}
int fstat64(int fd, struct stat64* into) {
  REAL(int, "fstat64", int, struct stat64*);
  return fails("stat", 0, fd) ? -1 : real(fd, into);
}
