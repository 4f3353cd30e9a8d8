"""Agents made elsewhere: whole ones are read in both layouts, others are refused with one sentence."""

import re
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from torch_files import pickled, tensor, write_pt

import tdmpc2_jax as td
from tdmpc2_support.agents import pretrained
from tdmpc2_support.agents.fold import fold_agent
from tdmpc2_support.envs.tasks import TASK_SETS
from tdmpc2_support.errors import UserError
from tdmpc2_support.run import checkpoints

LAYOUTS = ["", "_released_layout"]
STATES = ["single", "wide", "episodic", "two_q", "multitask"]


def shapes(tree):
    return jax.tree.map(jnp.shape, tree)


@pytest.mark.golden
@pytest.mark.parametrize("name", [*STATES, "rgb"])
def test_the_two_layouts_give_the_same_agent(golden, name):
    obs = "rgb" if name == "rgb" else "state"
    current, released = (pretrained.read_original(golden(f"{name}{layout}.pt"), obs) for layout in LAYOUTS)
    assert shapes(current) == shapes(released)
    jax.tree.map(np.testing.assert_array_equal, current, released)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(current.params))
    assert shapes(current.target_q) == shapes(current.params["q"])
    assert ("termination" in current.params) == (name == "episodic")
    assert current.tasks == (TASK_SETS["mt30"] if name == "multitask" else ()) and current.q_scale == 1


@pytest.mark.golden
def test_tensors_stand_where_the_networks_look_for_them(golden):
    tensors = pretrained.read_tensors(golden("episodic.pt"))
    params = pretrained.read_original(golden("episodic.pt")).params
    np.testing.assert_array_equal(params["q"]["params"]["linear_1"]["kernel"][3], tensors["_Qs.params.1.weight"][3].T)
    np.testing.assert_array_equal(
        params["termination"]["params"]["norm_0"]["scale"], tensors["_termination.0.ln.weight"]
    )
    assert params["encoder"]["params"].keys() == {"linear_0", "norm_0", "linear_1", "norm_1"}
    assert params["pi"]["params"].keys() == {"linear_0", "norm_0", "linear_1", "norm_1", "linear_2"}
    kernel = pretrained.read_tensors(golden("rgb.pt"))["_encoder.rgb.6.weight"]  # [out, in, height, width]
    encoder = pretrained.read_original(golden("rgb.pt"), "rgb").params["encoder"]["params"]
    assert encoder.keys() == {f"{x}_{i}" for x in ("kernel", "bias") for i in range(4)}
    np.testing.assert_array_equal(encoder["kernel_2"][2, 1, 5, 4], kernel[4, 5, 2, 1])


@pytest.mark.golden
def test_an_agent_that_sees_something_else_is_sent_to_its_script(golden):
    for name, obs, other in [
        ("rgb", "state", "sees states: it is one of pixels, for tdmpc2_jax_rgb.py"),
        ("single", "rgb", "sees pixels: it is one of states, for tdmpc2_jax.py"),
    ]:
        with pytest.raises(UserError, match=f"{name}.pt holds no TD-MPC2 agent that {other}"):
            pretrained.read_original(golden(f"{name}.pt"), obs)
    with pytest.raises(UserError, match=r"states: it is one of TD-MPC, for tdmpc_jax.py"):
        pretrained.from_torch({"_Q1.0.weight": np.zeros((2, 2)), "_pi.2.weight": np.zeros((2, 2))})
    with pytest.raises(UserError, match="single.pt is a single-task agent: it is for tdmpc2_jax.py"):
        pretrained.load_multitask(str(golden("single.pt")), ())


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ([1, 2], "holds a list, so it is no checkpoint {'model': tensors}"),
        (3, "holds a int"),
        (None, "holds a NoneType"),
        (tensor("FloatStorage", "0", 4, 0, (4,), (1,)), "holds a tensor"),
        ({"model": [1]}, "holds no tensors"),
        ({"agent": {}}, "holds no tensors"),
        ({"model": {"_encoder.state.0.weight": 1, "_pi.2.weight": 2}}, "holds no tensors"),
        ({"model": {"a": tensor("FloatStorage", "0", 4, 0, (4,), (1,))}}, "holds no TD-MPC2 agent that sees states"),
    ],
)
def test_a_file_that_holds_something_else_is_one_sentence(tmp_path, content, sentence):
    path = write_pt(tmp_path / "a.pt", pickled(content), {"0": bytes(16)})
    with pytest.raises(UserError, match=re.escape(f"{path} {sentence}")) as error:
        pretrained.read_original(path)
    assert "\n" not in str(error.value)


@pytest.mark.golden
def test_a_checkpoint_without_the_model_around_it_is_read_as_the_original_reads_it(golden, monkeypatch):
    tensors = pretrained.read_tensors(golden("single.pt"))
    monkeypatch.setattr(pretrained, "load_pt", lambda path: tensors)
    assert pretrained.read_tensors("bare.pt").keys() == tensors.keys()


@pytest.mark.golden
@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("_reward.1.bias", None, "_reward.1.bias is missing"),
        ("_target_Qs_params.1.ln.bias", None, "_target_Qs_params.1.ln.bias is missing"),
        ("_encoder.state.0.bias", lambda x: x.astype(np.int64), "_encoder.state.0.bias is missing"),
        ("_dynamics.2.weight", lambda x: x[0], "_dynamics.2.weight has shape (24,)"),
        ("_dynamics.2.bias", lambda x: x[0], "_dynamics.2.bias has shape ()"),
        ("_task_emb.weight", lambda x: x[0], "_task_emb.weight has shape (20,)"),
        ("_task_emb.weight", lambda x: x[:, :19], "the layers of its dynamics do not fit together"),
        ("_encoder.state.0.weight", lambda x: x[:, :20], "the layers of its encoder do not fit together"),
        ("_encoder.state.1.weight", lambda x: x[:, :9], "the layers of its encoder do not fit together"),
        ("_encoder.state.1.ln.bias", lambda x: x[:9], "the layers of its encoder do not fit together"),
        ("_reward.2.weight", None, "the layers of its reward do not fit together"),
        ("_pi.0.weight", lambda x: x[:, 1:], "the layers of its pi do not fit together"),
        ("_pi.2.bias", lambda x: x[:11], "the layers of its dynamics do not fit together"),
        ("_Qs.params.1.weight", lambda x: x[0], "the layers of its q do not fit together"),
        ("_Qs.params.0.bias", lambda x: x[:4], "the layers of its q do not fit together"),
        ("_target_Qs_params.2.bias", lambda x: x[:4], "the layers of its target Q do not fit together"),
    ],
)
def test_an_agent_that_is_not_whole_is_one_sentence(golden, name, change, sentence):
    tensors = pretrained.read_tensors(golden("multitask.pt"))
    tensors |= {name: change(tensors[name])} if change else {}
    tensors = {key: value for key, value in tensors.items() if change or key != name}
    with pytest.raises(UserError, match=re.escape(f"holds no whole agent: {sentence}")):
        pretrained.from_torch(tensors)


@pytest.mark.golden
def test_an_agent_without_value_functions_is_not_whole(golden):
    tensors = pretrained.read_tensors(golden("multitask.pt"))
    tensors |= {name: value[:0] for name, value in tensors.items() if "Qs" in name}
    with pytest.raises(UserError, match="the layers of its q do not fit together"):
        pretrained.from_torch(tensors)


@pytest.mark.golden
def test_a_multi_task_agent_has_the_names_of_its_tasks(golden):
    agent = pretrained.load_multitask(str(golden("multitask.pt")), ())
    assert agent.tasks == TASK_SETS["mt30"] and agent.params["task_emb"].shape == (30, 20)
    tensors = pretrained.read_tensors(golden("multitask.pt"))
    tensors["_task_emb.weight"] = tensors["_task_emb.weight"][:2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrained, "read_tensors", lambda path: tensors)
        with pytest.raises(UserError, match="two.pt knows 2 tasks: name them all with --tasks"):
            pretrained.load_multitask("two.pt", ("walker-walk",))
        agent = pretrained.load_multitask("two.pt", ("walker-walk", "cheetah-run"))
        assert agent.tasks == ("walker-walk", "cheetah-run")
        with pytest.raises(UserError, match="it knows 2 tasks without names"):
            fold_agent(pretrained.read_original("two.pt"), "walker-walk", 24, 6, "two.pt")


@pytest.mark.golden
def test_a_task_of_a_multi_task_agent_is_folded_in_and_its_q_scale_is_kept(golden):
    agent = pretrained.read_original(golden("multitask.pt"))._replace(q_scale=jnp.float32(3.5))
    single = fold_agent(agent, "cartpole_swingup", 5, 1, "a.pt")
    assert single.task_emb is None and single.tasks == () and single.q_scale == 3.5
    its = {"encoder": (5, 16), "dynamics": (25, 24), "reward": (25, 24), "pi": (24, 24), "q": (5, 25, 24)}
    assert {name: value["params"]["linear_0"]["kernel"].shape for name, value in single.params.items()} == its
    assert single.params["pi"]["params"]["linear_2"]["bias"].shape == (2,)
    assert shapes(single.target_q) == shapes(single.params["q"])
    row = np.asarray(agent.task_emb[TASK_SETS["mt30"].index("cartpole-swingup")], np.float64)
    first = agent.params["q"]["params"]["linear_0"]
    emb = row / max(1, np.linalg.norm(row))
    expected = first["bias"] + np.einsum("e,qeo->qo", emb, np.asarray(first["kernel"], np.float64)[:, 24:44])
    np.testing.assert_allclose(single.params["q"]["params"]["linear_0"]["bias"], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.golden
def test_agents_and_source_tasks_that_do_not_belong_together_are_refused(golden):
    single = pretrained.read_original(golden("single.pt"))
    multitask = pretrained.read_original(golden("multitask.pt"))
    assert fold_agent(single, None, 17, 6, "a.pt") is single
    for agent, source, sizes, sentence in [
        (single, "walker-walk", (17, 6), "a.pt is a single-task agent: leave out --source-task"),
        (multitask, None, (24, 6), "a.pt is a multi-task agent: name its task with --source-task"),
        (multitask, "dog-run", (24, 6), "a.pt was not trained on dog-run: it knows the tasks of mt30"),
        (multitask._replace(tasks=("a", "b")), "dog-run", (24, 6), "was not trained on dog-run: it knows a, b"),
        (multitask, "walker-wolk", (24, 6), "did you mean 'walker-walk'"),
        (multitask, "walker-walk", (39, 4), "it knows 24 observations and 6 actions, the task has 39 and 4"),
    ]:
        with pytest.raises(UserError, match=re.escape(sentence)):
            fold_agent(agent, source, *sizes, "a.pt")


@pytest.mark.golden
def test_an_agent_that_does_not_fit_hears_the_first_difference_and_what_would_fit(golden):
    like = pretrained.read_original(golden("single.pt")).params
    pretrained.check_shapes(like, jax.eval_shape(lambda: like), "a.pt", "this")
    wide = pretrained.read_original(golden("wide.pt")).params
    for params, sentence in [
        (
            like | {"dynamics": wide["dynamics"]},
            "a.pt does not fit --model-size 1: dynamics/params/linear_0/kernel is (45, 24) there and (30, 24) here$",
        ),
        (
            wide,
            "dynamics/params/linear_0/kernel is .*; it has --enc-dim 16 --mlp-dim 24 --latent-dim 24 "
            "--num-enc-layers 3 --num-q 5$",
        ),
        ({k: v for k, v in like.items() if k != "reward"}, "reward/params/linear_0/bias is missing there and"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=re.sub(r"[()]", r"\\\g<0>", sentence)):
            pretrained.check_shapes(params, like, "a.pt", "--model-size 1")


@pytest.mark.golden
def test_an_agent_of_a_file_is_folded_cut_and_compared(golden):
    def load(name, source, like, **options):
        return pretrained.load_agent(str(golden(name)), source, lambda key: like, **options)

    episodic = pretrained.read_original(golden("episodic.pt"))
    like = {name: value for name, value in episodic.params.items() if name != "termination"}
    assert load("episodic.pt", None, like).params.keys() == like.keys()
    assert "termination" in load("episodic.pt", None, episodic.params).params
    single = pretrained.read_original(golden("single.pt")).params
    for name, source, here, sentence in [
        ("single.pt", None, single | {"termination": like["reward"]}, "this task and these sizes: .* is missing there"),
        ("wide.pt", None, single, "; it has --enc-dim 16 --mlp-dim 24 --latent-dim 24 --num-enc-layers 3 --num-q 5$"),
        ("single.pt", "walker-walk", single, "is a single-task agent: leave out --source-task"),
    ]:
        with pytest.raises(UserError, match=f"{name} .*{sentence}"):
            load(name, source, here)
    multitask = pretrained.read_original(golden("multitask.pt"))
    like = fold_agent(multitask, "walker-walk", 24, 6, "a.pt").params
    loaded = load("multitask.pt", "walker-walk", like)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, like)
    assert loaded[2] == 1 and shapes(loaded[1]) == shapes(like["q"]), "params, target_q, q_scale"
    pixels = pretrained.read_original(golden("rgb.pt"), "rgb")
    jax.tree.map(np.testing.assert_array_equal, load("rgb.pt", None, pixels.params, obs="rgb"), pixels)


@pytest.mark.golden
def test_sizes_are_read_off_the_parameters(golden):
    agent = pretrained.read_original(golden("multitask.pt"))
    sizes = {"enc_dim": 16, "mlp_dim": 24, "latent_dim": 24, "num_enc_layers": 2, "num_q": 5}
    assert pretrained.sizes_of(agent.params) == sizes
    assert pretrained.sizes_of(agent.params | {"task_emb": agent.task_emb}) == sizes | {"task_dim": 20}
    pixels = pretrained.read_original(golden("rgb.pt"), "rgb").params
    assert pretrained.sizes_of(pixels) == {"mlp_dim": 24, "latent_dim": 128, "num_q": 5}


def test_the_layers_of_a_deep_network_are_in_the_order_of_their_numbers():
    agent = td.with_model_size(td.Agent(model_size=1, num_enc_layers=12, obs_dim=3, action_dim=2))
    params = jax.eval_shape(partial(td.init_params, agent), jax.random.key(0))
    found = pretrained.sizes_of(params)
    assert (found["num_enc_layers"], found["latent_dim"]) == (12, agent.latent_dim)
    part = {name: params[name] for name in ("encoder", "reward")}
    assert pretrained.sizes_of(part)["latent_dim"] == agent.latent_dim, "of a part, by its encoder"


@pytest.mark.golden
def test_an_agent_of_a_run_is_loaded_with_its_q_scale_whatever_else_the_checkpoint_holds(golden, tmp_path):
    agent = pretrained.read_original(golden("multitask.pt"))
    state = {"params": agent.params | {"task_emb": agent.task_emb}, "target_q": agent.target_q}
    state |= {"q_scale": jnp.float32(2.5), "model_opt": {"mu": jnp.zeros(7)}, "key": jax.random.key(0)}
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        checkpoints.write_checkpoint(manager, 10, {"script": "mt", "tasks": agent.tasks}, state=state)
    whole = pretrained.load_multitask(str(tmp_path), (), "mt")
    jax.tree.map(np.testing.assert_array_equal, whole.params, state["params"])
    jax.tree.map(np.testing.assert_array_equal, whole.target_q, state["target_q"])
    assert whole.q_scale == 2.5 and whole.tasks == agent.tasks
    folded = fold_agent(agent, "walker-walk", 24, 6, "a.pt")
    loaded = pretrained.load_agent(str(tmp_path), "walker-walk", lambda key: folded.params, "mt")
    jax.tree.map(np.testing.assert_array_equal, (loaded.params, loaded.target_q), (folded.params, folded.target_q))
    assert loaded.q_scale == 2.5
    with pytest.raises(UserError, match="10 is a checkpoint of mt.py, not of other.py"):
        pretrained.load_agent(str(tmp_path), "walker-walk", lambda key: folded.params, "other")


@pytest.mark.golden
def test_reading_an_agent_gives_no_warning(golden):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pretrained.read_original(golden("single.pt"))
