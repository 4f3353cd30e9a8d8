"""The 200 tasks that Newt (arXiv 2511.19584) learns side by side, by name, and the facts of those made for it.

Importing it loads nothing.
"""

from typing import NamedTuple

_NAMES = (
    (
        "",
        "walker-stand walker-walk walker-run cheetah-run reacher-easy reacher-hard acrobot-swingup "
        "pendulum-swingup cartpole-balance cartpole-balance-sparse cartpole-swingup cartpole-swingup-sparse "
        "cup-catch finger-spin finger-turn-easy finger-turn-hard fish-swim hopper-stand hopper-hop "
        "quadruped-walk quadruped-run",
    ),
    (
        "",
        "walker-walk-backwards walker-run-backwards cheetah-run-backwards cheetah-run-front cheetah-run-back "
        "cheetah-jump hopper-hop-backwards reacher-three-easy reacher-three-hard cup-spin pendulum-spin "
        "jumper-jump spinner-spin spinner-spin-backwards spinner-jump giraffe-run",
    ),
    (
        "mw-",
        "assembly basketball button-press-topdown button-press-topdown-wall button-press button-press-wall "
        "coffee-button coffee-pull coffee-push dial-turn disassemble door-open door-close drawer-close "
        "drawer-open faucet-open faucet-close hammer handle-press-side handle-press handle-pull-side "
        "handle-pull lever-pull peg-insert-side peg-unplug-side pick-out-of-hole pick-place pick-place-wall "
        "plate-slide plate-slide-side plate-slide-back plate-slide-back-side push-back push push-wall reach "
        "reach-wall soccer stick-push stick-pull sweep-into sweep window-open window-close bin-picking "
        "box-close door-lock door-unlock hand-insert",
    ),
    (
        "ms-",
        "ant-walk ant-run cartpole-balance cartpole-swingup hopper-stand hopper-hop pick-cube "
        "pick-cube-eepose pick-cube-so poke-cube push-cube pull-cube pull-cube-tool stack-cube place-sphere "
        "lift-peg pick-apple pick-banana pick-can pick-hammer pick-fork pick-knife pick-mug pick-orange "
        "pick-screwdriver pick-spoon pick-tennis-ball pick-baseball pick-cube-xarm6 pick-sponge anymal-reach "
        "reach reach-eepose reach-xarm6 cartpole-balance-sparse cartpole-swingup-sparse",
    ),
    (
        "mujoco-",
        "ant halfcheetah hopper inverted-pendulum reacher walker",
    ),
    (
        "",
        "bipedal-walker-flat bipedal-walker-uneven bipedal-walker-rugged bipedal-walker-hills "
        "bipedal-walker-obstacles lunarlander-land lunarlander-hover lunarlander-takeoff",
    ),
    (
        "rd-",
        "push-red push-green push-blue open-slide open-drawer flat-block-in-bin",
    ),
    (
        "og-",
        "ant antball point-arena point-maze point-bottleneck point-circle point-spiral ant-arena ant-maze "
        "ant-bottleneck ant-circle ant-spiral",
    ),
    (
        "pygame-",
        "cowboy coinrun spaceship pong bird-attack highway landing air-hockey rocket-collect chase-evade "
        "coconut-dodge cartpole-balance cartpole-swingup cartpole-balance-sparse cartpole-swingup-sparse "
        "cartpole-tremor point-maze-var1 point-maze-var2 point-maze-var3",
    ),
    (
        "atari-",
        "alien assault asterix atlantis bank-heist battle-zone beamrider boxing chopper-command crazy-climber "
        "double-dunk gopher ice-hockey jamesbond kangaroo krull ms-pacman name-this-game phoenix pong "
        "road-runner robotank seaquest space-invaders tutankham upndown yars-revenge",
    ),
)

# In the paper's order: a task's place is its id in agents that were trained elsewhere.
SOUP = tuple(f"{prefix}{task}" for prefix, tasks in _NAMES for task in tasks.split())


def newt_name(name: str) -> str:
    """What Newt's files call a task."""
    return name.replace("-backwards", "-backward")


class Facts(NamedTuple):
    """A task that was made for Newt, from an environment that others have."""

    obs_size: int
    action_size: int
    episode_length: int  # decisions
    action_repeat: int
    low: float  # the return, or success, that counts as 0 ...
    high: float  # ... and the one that counts as 1
    discount: float | None  # None: as the length of episodes gives it


# Observation, action, decisions, repeat, low, high, discount (-: by the length of episodes)
_FACTS = """
mujoco-ant 27 8 500 2 0 5000 0.99
mujoco-halfcheetah 17 6 1000 1 0 15000 0.99
mujoco-hopper 11 3 500 2 0 5000 0.99
mujoco-inverted-pendulum 4 1 500 2 0 1000 0.99
mujoco-reacher 11 2 50 1 -50 0 -
mujoco-walker 17 6 500 2 0 5000 0.99
bipedal-walker-flat 24 4 250 2 0 250 0.99
bipedal-walker-uneven 24 4 250 2 0 250 0.99
bipedal-walker-rugged 24 4 250 2 0 250 0.99
bipedal-walker-hills 24 4 250 2 0 250 0.99
bipedal-walker-obstacles 24 4 250 2 0 250 0.99
lunarlander-land 8 2 250 2 0 500 0.99
lunarlander-hover 10 2 250 2 0 500 0.99
lunarlander-takeoff 10 2 250 2 0 500 0.99
rd-push-red 73 5 100 10 0 1 -
rd-push-green 73 5 100 10 0 1 -
rd-push-blue 73 5 100 10 0 1 -
rd-open-slide 73 5 100 10 0 1 -
rd-open-drawer 73 5 100 10 0 1 -
rd-flat-block-in-bin 73 5 100 10 0 1 -
og-ant 29 8 1000 1 0 250 0.99
og-antball 42 8 200 1 0 1 -
og-point-arena 9 2 100 4 0 1 -
og-point-maze 9 2 100 4 0 1 -
og-point-bottleneck 9 2 100 4 0 1 -
og-point-circle 9 2 100 4 0 1 -
og-point-spiral 9 2 100 4 0 1 -
og-ant-arena 36 8 200 2 0 1 -
og-ant-maze 36 8 200 2 0 1 -
og-ant-bottleneck 36 8 200 2 0 1 -
og-ant-circle 36 8 200 2 0 1 -
og-ant-spiral 36 8 200 2 0 1 -
atari-alien 128 3 1000 4 0 1000 0.99
atari-assault 128 3 1000 4 0 1000 0.99
atari-asterix 128 3 1000 4 0 5000 0.99
atari-atlantis 128 3 1000 4 0 50000 0.99
atari-bank-heist 128 3 1000 4 0 1000 0.99
atari-battle-zone 128 3 1000 4 0 15000 0.99
atari-beamrider 128 3 1000 4 0 2000 0.99
atari-boxing 128 3 1000 4 -100 100 0.99
atari-chopper-command 128 3 1000 4 0 1000 0.99
atari-crazy-climber 128 3 1000 4 0 20000 0.99
atari-double-dunk 128 3 1000 4 0 25 0.99
atari-gopher 128 3 1000 4 0 2000 0.99
atari-ice-hockey 128 3 1000 4 -15 15 0.99
atari-jamesbond 128 3 1000 4 0 1000 0.99
atari-kangaroo 128 3 1000 4 0 10000 0.99
atari-krull 128 3 1000 4 0 10000 0.99
atari-ms-pacman 128 3 1000 4 0 5000 0.99
atari-name-this-game 128 3 1000 4 0 3000 0.99
atari-phoenix 128 3 1000 4 0 1000 0.99
atari-pong 128 3 1000 4 -21 21 0.99
atari-road-runner 128 3 1000 4 0 50000 0.99
atari-robotank 128 3 1000 4 0 50 0.99
atari-seaquest 128 3 1000 4 0 5000 0.99
atari-space-invaders 128 3 1000 4 0 2000 0.99
atari-tutankham 128 3 1000 4 0 100 0.99
atari-upndown 128 3 1000 4 0 5000 0.99
atari-yars-revenge 128 3 1000 4 0 20000 0.99
"""


def _parsed(line: str) -> tuple[str, Facts]:
    name, obs, action, length, repeat, low, high, discount = line.split()
    sizes = int(obs), int(action), int(length), int(repeat)
    return name, Facts(*sizes, float(low), float(high), None if discount == "-" else float(discount))


FACTS = dict(_parsed(line) for line in _FACTS.strip().splitlines())
