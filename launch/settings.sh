# Sourced by the launch and SLURM scripts: threads, memory allocators and network, from the allocation. What you have
# set yourself stays.

# Threads of numpy, MKL and OpenBLAS, a rank: what the job has for each task, one where nobody says. torch's own threads
# are set by `train.threads_per_rank`, whatever stands here, because the bits of a result depend on them.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
export MKL_NUM_THREADS="${MKL_NUM_THREADS:-$OMP_NUM_THREADS}"
export OPENBLAS_NUM_THREADS="${OPENBLAS_NUM_THREADS:-$OMP_NUM_THREADS}"

# srun no longer inherits --cpus-per-task from sbatch (SLURM 22.05 and newer): without this every task has one core.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK="${SRUN_CPUS_PER_TASK:-$SLURM_CPUS_PER_TASK}"

# glibc gives the large tensors of every step back to the kernel, which then clears the same pages for the next step.
# Keeping them took a fifth off a step of ResNet-18 with batches of 128 on a CPU. No effect with another allocator.
export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-4294967296}"
export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-17179869184}"
export MALLOC_TOP_PAD_="${MALLOC_TOP_PAD_:-268435456}"

# Python writes its lines when they are said, not when 8 KiB have come together: the log of a job shows where it is.
export PYTHONUNBUFFERED="${PYTHONUNBUFFERED:-1}"

# `python -m` searches the working folder first, so that a file types.py there would stand for Python's own. Not where
# fedfreeze itself is to be found there.
[ -e fedfreeze/__main__.py ] || export PYTHONSAFEPATH="${PYTHONSAFEPATH-1}"

# The network between nodes is the site's: torch takes the interface to which the host's name resolves. Where that is
# the wrong one (ranks wait at the start, or the slow network is used), name it in the marked block of your script:
#   export GLOO_SOCKET_IFNAME=ib0        # CPU ranks, and where ranks share a GPU
#   export NCCL_SOCKET_IFNAME=hsn0       # one rank a GPU
# `ip -brief address` on a node prints the names. NCCL_DEBUG=INFO tells what NCCL chose and why, NCCL_IB_DISABLE=1 keeps
# it from InfiniBand.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# Devices are numbered as nvidia-smi numbers them.
export CUDA_DEVICE_ORDER="${CUDA_DEVICE_ORDER:-PCI_BUS_ID}"

# The allocator of CUDA keeps its defaults: on a GPU a device's memory cap counts what the allocator has reserved, and
# other settings reserve otherwise. Without enforced caps (fleet.enforce=false) this wastes less where shapes change:
#   export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True

# Several ranks on one GPU take turns: kernels of two processes do not run at once, and each has a CUDA context of its
# own (some hundred MiB). With NVIDIA's Multi-Process Service their kernels can overlap. An ordinary user may start it
# on GPUs that are theirs alone for the job (not tested here), in the marked block of the script:
#   export CUDA_MPS_PIPE_DIRECTORY=/tmp/mps-$SLURM_JOB_ID CUDA_MPS_LOG_DIRECTORY=/tmp/mps-$SLURM_JOB_ID
#   srun --ntasks-per-node=1 bash -c 'mkdir -p "$CUDA_MPS_PIPE_DIRECTORY" && exec nvidia-cuda-mps-control -d'
# A fault of one rank on the GPU then ends the others on it too; the run goes on from its last checkpoint all the same.
