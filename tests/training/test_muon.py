"""Optimizers other than AdamW: Muon against optax's own and on meshes, which rule updates which parameter, rules of the user."""

import dataclasses
import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import meshes
from support.thinned import thin
from support.tiny_runs import ROOT, final_state, tiny, with_train
from support.tolerances import ANOTHER_PROGRAM, SHARDED_UPDATE, assert_close

from mhc_jax import optim
from mhc_jax.config import OptimizerConfig
from mhc_jax.connections import connection_module, parse
from mhc_jax.connections.parameter_paths import path_of
from mhc_jax.errors import InputError
from mhc_jax.files.json_files import read_json
from mhc_jax.loop import train
from mhc_jax.optim.optimizer import NEWTON_SCHULZ, muon
from mhc_jax.parallel.sharding import batch_sharding, make_mesh, state_shardings, using
from mhc_jax.train_step import init_state, make_train_step

BLOCKS, EXPERTS = 3, 2
SHAPES = {"wide": (4, 9), "tall": (7, 3), "experts": (EXPERTS, 5, 6)}


def test_muon_is_that_of_optax_for_each_matrix_of_a_stack():
    """Three updates of stacked blocks and experts against optax.contrib.muon of every matrix by itself."""
    draw = np.random.default_rng(0)
    gradients = [{n: np.float32(draw.normal(size=(BLOCKS, *s))) for n, s in SHAPES.items()} for _ in range(3)]

    def apart(tree):
        return {
            f"{name} {k} {e}": matrix
            for name, a in tree.items()
            for k, block in enumerate(a)
            for e, matrix in enumerate(block if block.ndim == 3 else [block])
        }

    def run(tx, gradients):
        out, state = [], tx.init(gradients[0])
        for gradient in gradients:
            updates, state = tx.update(gradient, state, gradient)  # weight decay 0 does not use the parameters
            out.append(updates)
        return out

    peer = optax.contrib.muon(
        -1.0, ns_coeffs=NEWTON_SCHULZ, ns_steps=len(NEWTON_SCHULZ), beta=0.9, eps=1e-20, consistent_rms=0.2
    )
    ours = jax.jit(functools.partial(run, muon(0.9, 0.2)))(gradients)
    expected = jax.jit(functools.partial(run, peer))([apart(gradient) for gradient in gradients])
    for a, b in zip(ours, expected, strict=True):
        for name, matrix in apart(a).items():
            assert_close(matrix, b[name], ANOTHER_PROGRAM, name)
    largest = [
        np.linalg.svd(matrix / (0.2 * max(matrix.shape) ** 0.5), compute_uv=False).max()
        for matrix in apart(ours[0]).values()
    ]
    np.testing.assert_allclose(largest, 1, atol=0.1, err_msg="orthogonal up to the iteration's error")


def rules(kind, **settings):
    """Path -> rule of every parameter of a tiny decoder with experts."""
    config = tiny(Path("unused.txt"), kind, model={"vocab_size": 32, "experts": "4:active=2:width=8:dense_layers=0"})
    shapes = jax.eval_shape(lambda: init_state(config)).params
    link = connection_module(config.model.connection)
    leaves = [(path_of(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)]
    return {p: optim.rule_of(OptimizerConfig("muon", **settings), link, p, leaf.ndim) for p, leaf in leaves}


ADAMW = r"(^|/)((un)?embedding|(\w*norm/)?weight|router_bias|{})$"


@pytest.mark.parametrize(
    ("kind", "static"),
    [
        ("residual", "none"),
        ("mhc:exit=head:entry=scaled", "alpha|bias|head_alpha|head_bias|entry_scale"),
        ("hc", "A_m|B|A_r|s_a|s_b"),
        ("gated", "norm"),
        ("attnres_block", "w"),  # a vector
    ],
)
def test_muon_updates_matrices_as_deepseek_v4_does(kind, static):
    found = rules(kind)
    assert {path for path, rule in found.items() if rule == "adamw"} == {
        path for path in found if re.search(ADAMW.format(static), path)
    }
    assert found["layers/mlp/W_router"] == found["layers/mlp/W_gate"] == "muon"
    apart = rules(kind, connections="adamw")
    of_links = {path for path in found if "_connection/" in path or path.startswith("ends/")}
    assert {path for path in found if apart[path] != found[path]} == {p for p in of_links if found[p] == "muon"}
    assert all(apart[path] == "adamw" for path in of_links)


MESHES = [{"fsdp": 2, "tensor": 2}, {"data": 2}, {"fsdp": 4}, {"tensor": 2}, {"stage": 2}, {"data": 2, "fsdp": 2}]
MESHES += [{"expert": 2, "fsdp": 2}, {"stage": 2, "expert": 2}]


def updated(config):
    """Parameters after two steps, by path.  They begin at random numbers, because zeros have no direction to compare."""
    mesh = make_mesh(config.mesh)
    state = init_state(config).replace(params=meshes.random_params(config))
    shardings, rows = (state_shardings(mesh, state), batch_sharding(mesh)) if mesh else (None, None)
    state = jax.device_put(state, shardings)
    with using(mesh):
        step = jax.jit(make_train_step(config), out_shardings=shardings and (shardings, None))
        for seed in range(2):
            state, _ = step(state, jax.device_put(meshes.batch(config, seed), rows))
    return {path_of(path): np.asarray(a) for path, a in jax.tree_util.tree_leaves_with_path(state.params)}


def of(mesh, blocks=2):
    """Three blocks over two or four devices: their matrices are padded to a number that the devices divide.

    Equal streams would give H_res a gradient of zero but for rounding, of which AdamW and Muon make whole steps.
    """
    experts = meshes.EXPERTS if "expert" in mesh else {}
    config = meshes.tiny("mhc:entry=scaled:t_max=2", mesh, accumulation_steps=2, num_layers=blocks, **experts)
    return dataclasses.replace(
        config, optimizer=dataclasses.replace(config.optimizer, name="muon", warmup_steps=0, eps=1e-3)
    )


@pytest.mark.parametrize("mesh", thin(MESHES, MESHES[0].__eq__), ids=meshes.name_of)
def test_two_steps_of_muon_on_a_mesh_are_those_of_one_device(mesh):
    config = of(mesh, 2 if "stage" in mesh else 3)
    expected = updated(meshes.alone(config))
    for path, value in updated(config).items():
        assert_close(value, expected[path], SHARDED_UPDATE, path)


@pytest.mark.parametrize("mesh", [{"fsdp": 2, "tensor": 2}, {"expert": 4}], ids=meshes.name_of)
def test_matrices_travel_whole_and_are_gathered_by_no_device(mesh):
    """Over fsdp and tensor each array adds an all-to-all there and one back for each axis.  Experts are whole and do not move."""
    kinds, axes = {}, mesh
    for name in ("adamw", "muon"):
        config = of(axes, 4)
        config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, name=name))
        mesh = make_mesh(config.mesh)
        state = jax.eval_shape(lambda config=config: init_state(config))
        shardings = state_shardings(mesh, state)
        with using(mesh):
            step = jax.jit(make_train_step(config), in_shardings=(shardings, batch_sharding(mesh)))
            compiled = step.lower(state, meshes.batch(config)).compile()
        found = [kind for kind, _ in meshes.collectives(compiled)]
        kinds[name] = {kind: found.count(kind) for kind in set(found)}
    added = {kind: kinds["muon"].get(kind, 0) - kinds["adamw"].get(kind, 0) for kind in kinds["muon"]}
    matrices = 7  # W_q, W_k, W_v, W_o, W_gate, W_up, W_down
    if "fsdp" in axes:
        assert {kind: count for kind, count in added.items() if count} == {"all-to-all": 2 * 2 * matrices}
    else:
        assert added.get("all-to-all", 0) == 0


def test_lion_and_sgd_by_hand():
    """Two updates in float64, with decoupled weight decay."""
    gradients = np.random.default_rng(0).normal(size=(2, 3))
    for name in ("lion", "sgd"):
        settings = {
            "learning_rate": 0.1,
            "schedule": "constant",
            "warmup_steps": 0,
            "grad_clip": 0.0,
            "b1": 0.7,
            "b2": 0.9,
        }
        tx = optim.optimizer(
            OptimizerConfig(name, weight_decay=0.25, **settings), 10, connection_module(parse("residual"))
        )
        params = by_hand = np.array([1.0, -2.0, 0.5])
        params, m = {"w": np.float32(params)}, 0.0
        state = tx.init(params)
        for g in gradients:
            updates, state = jax.jit(tx.update)({"w": np.float32(g)}, state, params)
            params = jax.tree.map(np.add, params, updates)
            u = np.sign(0.7 * m + 0.3 * g) if name == "lion" else 0.7 * m + g
            m = 0.9 * m + 0.1 * g if name == "lion" else u
            by_hand = by_hand - 0.1 * (u + 0.25 * by_hand)
            np.testing.assert_allclose(params["w"], by_hand, rtol=1e-5)


EXAMPLE = re.search(r"```python\n# my_optimizer.py\n(.*?)```", (ROOT / "docs/optimizers.md").read_text(), re.DOTALL)


def test_an_optimizer_of_the_user_trains_and_its_groups_are_recorded(text, tmp_path, monkeypatch, capsys):
    """The example of the page, for all but the connection."""
    monkeypatch.chdir(tmp_path)
    Path("my_optimizer.py").write_text(EXAMPLE[1])
    mine = tiny(text, "mhc:t_max=2", optimizer={"name": "my_optimizer.py:ademamix", "connections": "adamw"})
    train(mine, tmp_path / "run")
    groups = read_json(tmp_path / "run" / "env.json")["optimizer"]
    assert {group["rule"] for group in groups} == {"my_optimizer.py:ademamix", "adamw"}
    assert all(("_connection/" in path) == (g["rule"] == "adamw") for g in groups for path in g["arrays"])
    assert read_json(tmp_path / "run" / "config.json")["optimizer"]["name"] == "my_optimizer.py:ademamix"
    shown = capsys.readouterr().err
    assert re.search(r"updated by +learning rate +weight decay +parameters +arrays\n", shown)
    assert re.search(
        r"my_optimizer.py:ademamix +0.003 +0.1 +[\d,]+ +embedding unembedding, layers/attention/W_k ", shown
    )


def test_four_steps_of_muon_and_four_more_are_eight(text, tmp_path):
    """Parameters and the state of the optimizer are bitwise those of one run, for a schedule that does not look ahead."""
    optimizer = {"name": "muon", "schedule": "constant", "warmup_steps": 0}
    eight = tiny(text, "mhc:t_max=2", optimizer=optimizer)
    train(eight, tmp_path / "eight")
    train(with_train(eight, steps=4), tmp_path / "four")
    train(with_train(eight, init_from=str(tmp_path / "four"), init_state="all"), tmp_path / "more")
    jax.tree.map(np.testing.assert_array_equal, final_state(tmp_path / "more"), final_state(tmp_path / "eight"))


def test_the_table_of_groups_tells_every_rate_and_decay():
    config = OptimizerConfig("muon", learning_rate=0.01, weight_decay=0.1, connection_lr_multiplier=0.5)
    shapes = {
        "embedding": jnp.zeros((4, 2)),
        "layers": {
            "mlp": {"W_down": jnp.zeros((2, 3, 2)), "W_up": jnp.zeros((2, 2, 3))},
            "mlp_connection": {"phi": jnp.zeros((2, 8, 24)), "bias": jnp.zeros((2, 24))},
        },
    }
    assert optim.table(optim.groups(shapes, config, connection_module(parse("mhc")))) == [
        "updated by  learning rate  weight decay  parameters  arrays",
        "muon        0.005          0.1           384         layers/mlp_connection/phi",
        "adamw       0.005          0             48          layers/mlp_connection/bias",
        "muon        0.01           0.1           24          layers/mlp/W_down W_up",
        "adamw       0.01           0.1           8           embedding",
    ]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"name": "mine.py"}, "name its function too: 'FILE.py:FUNCTION'"),
        ({"name": "mion"}, "optimizer.name is 'mion'.*muon"),
        ({"name": "adamw:rms=1"}, "'adamw' has no settings"),
        ({"name": "muon:rms=0"}, "rms of muon is 0.0; it must be above 0"),
        ({"name": "muon:momentum=1"}, r"momentum of muon is 1.0; it must lie in \[0, 1\)"),
        ({"connections": "muon"}, "optimizer.connections is 'muon'"),
    ],
)
def test_a_bad_optimizer_is_refused(settings, sentence):
    with pytest.raises(InputError, match=sentence):
        OptimizerConfig(**settings)


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        (None, "There is no file 'mine.py', which optimizer.name 'mine.py:rule' names"),
        ("def rule(): pass", r"does not take one argument; write `def rule\(config\):`"),
        ("def rule(config): return 3", "returns a int; it must return a transformation of optax"),
        ("def rule(config):\n    return config.nothing", "fails at line 2: AttributeError"),
        ("import sys; sys.exit(3)", "fails at line 1: SystemExit: 3"),
        ("def role(config): pass", "The function in optimizer.name 'mine.py:rule' is 'rule'.*role"),
        ("import optax\ndef rule(config): return optax.adam(1e-2)", "points against the gradient"),
        (
            "import optax\ndef rule(config):\n    return optax.stateless(lambda u, p: {k: v / 0 for k, v in p['no'].items()})",
            "fails at line 3: KeyError: 'no'",
        ),
    ],
)
def test_a_bad_function_is_refused_before_a_folder_is_made(code, sentence, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if code:
        Path("mine.py").write_text(code)
    with pytest.raises(InputError, match=sentence):
        train(tiny(text, "residual", optimizer={"name": "mine.py:rule"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
