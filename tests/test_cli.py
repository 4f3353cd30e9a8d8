"""Bad input: one clear sentence and an exit status that is not 0, before anything starts."""

import fcntl
import json
import sys

import pytest

import tdmpc2_jax as td
import tdmpc_jax
from tdmpc2_support.cli import settings, with_settings

SCRIPT = td
CARTPOLE = ["--task", "cartpole-balance"]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--task", "dog-rum"], ["dog-rum", "dog-run", "python envs.py"]),
        (["--task", "HalfChetah-v5"], ["HalfCheetah-v5"]),
        (["--task", "strange_envs:Discrete-v0"], ["Discrete", "continuous"]),
        (["--task", "strange_envs:Pixels-v0"], ["pictures", "observations"]),
        ([*CARTPOLE, "--num-envs", 0], ["--num-envs", "from 1 to"]),
        ([*CARTPOLE, "--buffer-size", 2000], ["--buffer-size 2000", "2500 seed steps"]),
        ([*CARTPOLE, "--evaluate"], ["--checkpoint"]),
        ([*CARTPOLE, "--json", "x.json"], ["--evaluate"]),
        ([*CARTPOLE, "--source-task", "walker-walk"], ["--checkpoint"]),
        ([*CARTPOLE, "--evaluate", "--checkpoint", "nowhere"], ["nowhere", "does not exist"]),
        ([*CARTPOLE, "--evaluate", "--checkpoint", "nowhere.pt"], ["nowhere.pt"]),
        ([*CARTPOLE, "--num-elites", 1000], ["--num-elites"]),
        ([*CARTPOLE, "--latent-dim", 30], ["--simnorm-dim"]),
        ([*CARTPOLE, "--simnorm-dim", 7], ["--latent-dim"]),
        ([*CARTPOLE, "--utd", 0], ["--utd"]),
        (["--task", "HalfCheetah-v5", "--save-episodes", "data"], ["--save-episodes", "python envs.py"]),
    ],
    ids=lambda value: " ".join(map(str, value))[:40],
)
def test_arguments_that_cannot_work_are_refused_in_one_sentence(refused, flags, words):
    sentence = refused(*flags)
    assert all(word in sentence for word in words), sentence


def test_a_model_size_that_another_script_has_is_not_taken_from_its_record():
    record = {"enc_dim": 8, "batch_size": 2}
    for size in (None, "L"):
        agent = with_settings(td.Args(), record | {"model_size": size}).agent
        assert (agent.model_size, agent.enc_dim, agent.batch_size) == (5, 8, 2)
    assert with_settings(td.Args(), record | {"model_size": 48}).agent.model_size == 48


NONSENSE = """
lr=-1 lr=0 lr=nan lr=inf enc-lr-scale=-1 enc-lr-scale=nan tau=2 tau=-0.1 tau=nan rho=2 rho=-0.5 grad-clip-norm=0
grad-clip-norm=nan discount-min=2 discount-min=0.999 discount-max=1.5 discount-max=nan discount-denom=0
enc-dim=0 enc-dim=-1 mlp-dim=0 latent-dim=0 latent-dim=-8 num-enc-layers=0 num-q=1 num-q=-2 num-bins=1 vmin=10 vmin=nan
vmax=-10 vmax=inf simnorm-dim=0 simnorm-dim=-8 dropout=1 dropout=-0.1 dropout=nan log-std-min=2 log-std-max=nan
batch-size=0 batch-size=-4 buffer-size=0 buffer-size=100000000000 num-envs=-1 utd=-1 utd=inf utd=nan seed-steps=-1
seed-steps=0 consistency-coef=-1 reward-coef=-0.1 value-coef=nan termination-coef=-1 entropy-coef=inf horizon=0
iterations=-1 num-samples=0 num-elites=0 num-elites=513 num-pi-trajs=-1 num-pi-trajs=512 min-std=3 min-std=-1 max-std=0
max-std=nan temperature=-1 temperature=nan exp-name= exp-name=../x exp-name=/x seed=-1 seed=2147483648 total-timesteps=0
eval-freq=0 eval-episodes=-3 checkpoint-freq=0 log-freq=-1 json=nowhere/x.json
""".split()


@pytest.mark.parametrize("flag", [*NONSENSE, "exp-name=" + "x" * 300])
def test_numbers_and_names_that_make_no_sense_are_refused_with_their_flag(refused, flag):
    assert f"--{flag.partition('=')[0]}" in refused(*CARTPOLE, f"--{flag}")


FIRST_NONSENSE = """
lr=0 tau=2 target-update-freq=0 per-alpha=2 per-beta=-1 discount=1.5 loss-bound=0 noise-clip=-1 horizon=0
first-horizon=0 first-horizon=6 first-min-std=3 schedule-steps=0 momentum=-0.1 action-repeat=0 latent-dim=0
batch-size=0 iterations=0 seed-steps=5 buffer-size=5000 total-timesteps=0 num-elites=600
""".split()


@pytest.mark.parametrize("flag", FIRST_NONSENSE)
def test_the_first_version_refuses_numbers_that_make_no_sense(refused, flag):
    assert f"--{flag.partition('=')[0]}" in refused(*CARTPOLE, f"--{flag}", script=tdmpc_jax)


@pytest.mark.golden
def test_checkpoints_of_the_other_version_are_refused(refused, golden):
    evaluation = [*CARTPOLE, "--evaluate", "--checkpoint"]
    assert "it is one of TD-MPC, for tdmpc_jax.py" in refused(*evaluation, golden("tdmpc1.pt"))
    second = refused(*evaluation, golden("single.pt"), script=tdmpc_jax)
    assert "holds no TD-MPC agent that sees states: it is one of states, for tdmpc2_jax.py" in second
    other_task = refused(*evaluation, golden("tdmpc1.pt"), script=tdmpc_jax)
    assert other_task.endswith("it has --enc-dim 16 --mlp-dim 24 --latent-dim 10")
    assert "does not exist" in refused(*evaluation, "nowhere", script=tdmpc_jax)


def test_checkpoints_that_are_damaged_or_foreign_are_refused(refused, tmp_path, golden):
    def evaluation_of(path, *flags):
        return refused(*CARTPOLE, "--evaluate", "--eval-episodes", 1, "--checkpoint", path, *flags)

    (tmp_path / "empty").mkdir()
    assert "holds no checkpoint" in evaluation_of(tmp_path / "empty")
    foreign = tmp_path / "foreign" / "checkpoints" / "100" / "meta"
    foreign.mkdir(parents=True)
    (foreign / "metadata").write_text(json.dumps({"somebody": "else"}))
    assert "not a checkpoint of tdmpc2_jax.py" in evaluation_of(tmp_path / "foreign")
    (foreign / "metadata").write_text('{"script": "tdmpc2_')
    assert "damaged" in evaluation_of(tmp_path / "foreign")
    whole = golden("single.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    assert "cut.pt" in evaluation_of(tmp_path / "cut.pt")
    (tmp_path / "text.pt").write_text("hello")
    assert "text.pt" in evaluation_of(tmp_path / "text.pt")
    assert "it has --enc-dim 16 --mlp-dim 24" in evaluation_of(golden("single.pt"))
    assert "--source-task" in evaluation_of(golden("multitask.pt"))
    assert "single-task" in evaluation_of(golden("single.pt"), "--source-task", "walker-walk")
    assert "dog-run" in evaluation_of(golden("multitask.pt"), "--source-task", "dog-run")
    larger = refused("--task", "humanoid-walk", "--checkpoint", golden("multitask.pt"), "--source-task", "walker-walk")
    assert "it knows 24 observations and 6 actions, the task has 67 and 21" in larger


def test_a_folder_in_use_or_with_another_run_is_refused(refused, tmp_path):
    folder = tmp_path / "cartpole-balance" / "tdmpc2_jax" / "1"
    folder.mkdir(parents=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "in use by a live run" in refused(*CARTPOLE, "--runs-dir", tmp_path)
    record = {**settings(td.Args(task="cartpole-balance")), "batch_size": 128}
    (folder / "args.json").write_text(json.dumps(record))
    (folder / "eval.csv").write_text("step,reward,success,seed\n0,1.0,0.0,1\n")
    assert "--resume" in refused(*CARTPOLE, "--runs-dir", tmp_path)
    changed = refused(*CARTPOLE, "--runs-dir", tmp_path, "--resume", "--no-mpc", "--enc-dim", 64)
    assert "as it was started: without --enc-dim, --mpc" in changed, "what is not said is as it was"


def test_video_without_a_gl_library_names_the_packages(refused, monkeypatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(sys, "executable", "/bin/false")  # each library is tried in a process of its own: none works
    assert "apt-get install -y libegl1" in refused(*CARTPOLE, "--capture-video")


def test_video_that_the_user_has_switched_off_is_refused(refused, monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "disable")
    assert "MUJOCO_GL=disable forbids pictures" in refused(*CARTPOLE, "--capture-video")


def test_the_command_line_exits_with_one_sentence(script):
    status, out, err = script("--task", "dog-rum", small=False)
    assert status == 1 and err.startswith("error: ") and len(err.splitlines()) == 1 and not out
    status, _, err = script("--model-size", 7, small=False)
    assert status == 2 and "invalid choice '7'" in err and "317" in err


@pytest.mark.parametrize("td, words", [(td, "value heads"), (tdmpc_jax, "beside the N")], ids=["tdmpc2", "tdmpc"])
def test_help_explains_every_argument(here, td, words):
    status, out, _ = here("--help", small=False, name=f"{td.__name__}.py")
    assert status == 0
    for name in settings(td.Args()):
        assert f"--{name.replace('_', '-')}" in out
    assert "--obs-dim" not in out, "what the task decides is no flag"
    assert words in out and "inverse temperature" in out
