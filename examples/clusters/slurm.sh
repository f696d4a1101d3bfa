#!/bin/bash
# A merge on 8 machines of 8 GPUs each: sbatch examples/clusters/slurm.sh
# The adapters, the output and this package lie on a file system that all machines share.
#SBATCH --job-name=merge
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=01:00:00
#SBATCH --requeue
# After --requeue, or when it is submitted again, the job goes on where it was.
set -euo pipefail

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / 8))

srun torchrun \
  --nnodes "$SLURM_NNODES" --nproc-per-node 8 --max-restarts 3 \
  --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$head:29500" \
  -m domerge_fast merge /shared/adapters/* -o /shared/merged --method do --device cuda --quiet
