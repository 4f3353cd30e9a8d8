#!/usr/bin/env bash
# Makes old_runs.tar.xz: small run folders of every script, as the last version with one `Args` wrote them.
#   git worktree add /tmp/old f637694 && bash old_runs.sh /tmp/old python old_runs.tar.xz
# Each run keeps its first checkpoint only, so that a test can go on with it from there.
set -euo pipefail
old=$(realpath "$1")
python=$2
archive=$(realpath "$3")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export PYTHONPATH=$old:$old/tests JAX_PLATFORMS=cpu

planner="--num-samples 32 --num-elites 8 --num-pi-trajs 4 --iterations 2"
tdmpc1="--mlp-dim 16 --latent-dim 16 --batch-size 16 $planner --eval-episodes 2 --log-freq 50"
small="$tdmpc1 --num-q 2"
states="--enc-dim 16 --seed-steps 100 --buffer-size 3000"
transformers="--width 16 --heads 2 --dynamics-blocks 1 --proposal-blocks 1 --objective-blocks 1 --future 4
  --num-proposals 2 --num-policy 1 --diffusion-batch-size 8 --log-freq 20"

first_checkpoint() { # RUN STEP: without what is later than STEP
  find "$1/checkpoints" -mindepth 1 -maxdepth 1 ! -name "$2" -exec rm -r {} +
  rm -f "$1"/events*
}

"$python" "$old/tdmpc2_jax.py" $small $states --task strange_envs:Point-v0 \
  --total-timesteps 300 --eval-freq 200 --checkpoint-freq 200
first_checkpoint runs/strange_envs:Point-v0/tdmpc2_jax/1 200

"$python" "$old/tdmpc_jax.py" $tdmpc1 $states --schedule-steps 200 --task strange_envs:Point-v0 \
  --total-timesteps 300 --eval-freq 200 --checkpoint-freq 200
first_checkpoint runs/strange_envs:Point-v0/tdmpc_jax/1 200

"$python" "$old/tdmpc2_jax_rgb.py" $small --batch-size 8 --seed-steps 100 --buffer-size 3000 \
  --task strange_envs:Pixels-v0 --total-timesteps 220 --eval-freq 200 --checkpoint-freq 200
first_checkpoint runs/strange_envs:Pixels-v0/tdmpc2_jax_rgb/1 200

for task in cartpole-balance pendulum-spin; do
  "$python" "$old/tdmpc2_jax.py" $small $states --seed-steps 1000 --task $task \
    --total-timesteps 2100 --eval-freq 3000 --checkpoint-freq 3000 --save-episodes data --no-mpc
done
rm -r runs/pendulum-spin
first_checkpoint runs/cartpole-balance/tdmpc2_jax/1 2100

"$python" "$old/tdmpc2_jax_mt.py" $small --enc-dim 16 --task-dim 8 --tasks cartpole-balance,pendulum-spin \
  --data-dir data --num-updates 40 --eval-freq 30 --checkpoint-freq 30 --no-mpc --eval-episodes 1
first_checkpoint runs/cartpole-balance+pendulum-spin/tdmpc2_jax_mt/1 30
"$python" "$old/tdmpc2_jax_mt.py" --quantize int8 --output int8.safetensors \
  --checkpoint runs/cartpole-balance+pendulum-spin/tdmpc2_jax_mt/1

"$python" "$old/tdmpc2_jax_diffusion.py" $transformers --world-model runs/cartpole-balance/tdmpc2_jax/1 --data-dir data \
  --num-updates 40 --checkpoint-freq 20 --eval-freq 1000 --eval-episodes 1 --planner pi
first_checkpoint runs/cartpole-balance/tdmpc2_jax_diffusion/1 20
rm -rf runs/cartpole-balance/tdmpc2_jax/1/checkpoints/*/replay

tar -cJf "$archive" -- *
