#include <cstdlib>
#include <stdexcept>

#include "dispatch.h"

#ifdef DOMERGE_X86
#include <cpuid.h>
#endif
#if defined(DOMERGE_AMX) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace domerge {

#ifdef DOMERGE_AMX
namespace amx {
const Kernels& kernels();
}
#endif
#ifdef DOMERGE_AVX512_BF16
namespace avx512_bf16 {
const Kernels& kernels();
}
#endif
#ifdef DOMERGE_X86
namespace avx512 {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
#endif
namespace baseline {
extern const Kernels kernels;
}

namespace {

#if defined(DOMERGE_AMX) && defined(__linux__)
// AMX, and Linux' leave for this process to use its registers.
bool may_use_amx() {
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE
    static const bool granted = __builtin_cpu_supports("amx-tile") &&
                                __builtin_cpu_supports("amx-bf16") &&
                                syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    return granted;
}
#endif

#ifdef DOMERGE_X86
// Asked of the processor: older compilers do not know the name, and a virtual machine may hide it.
bool has_f16c() {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

std::vector<const Kernels*> supported() {
    std::vector<const Kernels*> list;
#ifdef DOMERGE_X86
    __builtin_cpu_init();
    const bool fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    if (fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
#if defined(DOMERGE_AMX) && defined(__linux__)
        if (may_use_amx()) list.push_back(&amx::kernels());
#endif
#ifdef DOMERGE_AVX512_BF16
        if (__builtin_cpu_supports("avx512bf16")) list.push_back(&avx512_bf16::kernels());
#endif
        list.push_back(&avx512::kernels);
    }
    if (fma) list.push_back(&avx2::kernels);
#endif
    list.push_back(&baseline::kernels);
    return list;
}

}  // namespace

std::vector<std::string> supported_isas() {
    std::vector<std::string> names;
    for (const Kernels* kernels : supported()) names.emplace_back(kernels->name);
    return names;
}

const Kernels& choose_kernels() {
    const std::vector<const Kernels*> list = supported();
    const char* wanted = std::getenv("DOMERGE_CPU_ISA");
    if (!wanted || !*wanted) return *list.front();
    std::string names;
    for (const Kernels* kernels : list) {
        if (wanted == std::string(kernels->name)) return *kernels;
        names += names.empty() ? kernels->name : std::string(", ") + kernels->name;
    }
    throw std::runtime_error("DOMERGE_CPU_ISA=" + std::string(wanted) +
                             " cannot run here: choose one of " + names + ", or unset it");
}

}  // namespace domerge
