#!/bin/bash
# sbatch docs/launch/slurm.sh my.toml      two machines of two cards; from the folder with the recipe, on a disk that all
# machines see. Submitted or requeued again, it goes on with the run that it finds.
#SBATCH --job-name=qtune
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=2
#SBATCH --gpus-per-node=2
#SBATCH --cpus-per-task=4
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append

recipe=${1:?"sbatch slurm.sh RECIPE"}
run=runs/$SLURM_JOB_NAME-$(basename "$recipe" .toml)

if [ -e "$run/invocation.json" ]; then
    srun --kill-on-bad-exit=1 qtune resume "$run"
else
    srun --kill-on-bad-exit=1 qtune run "$recipe" --output "$run"
fi
