"""Where squares overflow float32, every norm gives NaN for that token, and the run ends as diverged at that step."""

import functools
import itertools

import jax
import jax.numpy as jnp
import mhc_kernels
import numpy as np
import pytest
from mhc_kernels import Coefficients, projection, write_read
from support.kernel_checks import pulled
from support.thinned import thin
from support.tiny_runs import lines, tiny, write_text
from support.tolerances import assert_close

from mhc_jax.connections.gated import stream_norm
from mhc_jax.data import Data, load_data
from mhc_jax.diagnostics import root_mean_square
from mhc_jax.layers.norm import rms_norm
from mhc_jax.loop import train

C, EPS = 128, 1e-20
MAGNITUDES = np.array([1.0, 0.0, 1e-40, 1e-30, 1e17, 1e18, 1e19, 1e30, 1.0])
"""Magnitude of each token, so that each is seen to leave its neighbours alone.  128 squares of 1e19 overflow, of 1e18 not."""
FORMS = {
    "xla on a CPU": {"implementation": "xla", "platform": "cpu"},
    "xla elsewhere": {"implementation": "xla", "platform": "tpu"},
    "pallas_tpu": {"implementation": "pallas_tpu", "interpret": True},
    "pallas_gpu": {"implementation": "pallas_gpu", "interpret": True},
}


form_and_dtype = pytest.mark.parametrize(
    ("form", "dtype"),
    thin(
        itertools.product(FORMS, ("float32", "bfloat16")),
        lambda case: case[1] == "float32" or case[0] == "pallas_tpu",
    ),
)


def tokens(width, dtype):
    """Tokens of plus or minus each magnitude, the same in float64, and which have a finite sum of squares in float32."""
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (len(MAGNITUDES), width))
    x = jnp.asarray(MAGNITUDES[:, None] * signs, dtype)
    exact = np.asarray(x, np.float64)
    return x, exact, width * MAGNITUDES**2 < float(jnp.finfo(jnp.float32).max)


def normal(exact):
    """Float64 RMSNorm without a weight."""
    return exact / np.sqrt((exact**2).mean(-1, keepdims=True) + EPS)


def assert_sound(values, expected, sound, what):
    """Values are as expected at sound tokens (rows) and NaN at the others; 1e-40 may be flushed to 0."""
    assert np.isnan(np.asarray(values)[~sound]).all(), what
    assert_close(np.asarray(values)[sound], expected[sound], what=what)


@form_and_dtype
def test_projection(form, dtype):
    x, exact, sound = tokens(C, dtype)
    phi = jnp.asarray(np.random.default_rng(1).normal(size=(C, 24)) / np.sqrt(C), jnp.float32)
    with mhc_kernels.settings(**FORMS[form]):
        z, (dx,) = pulled(lambda x: projection(x, phi, EPS))((x,), jnp.ones((24, len(x))))
    assert_sound(z.T, normal(exact) @ np.asarray(phi, np.float64), sound, form)
    assert np.isfinite(np.asarray(dx, np.float32)[sound]).all()


@form_and_dtype
def test_write_read(form, dtype):
    """A boundary that writes nothing has NaN coefficients and a NaN read where squares of the streams overflow."""
    n, N = 2, len(MAGNITUDES)
    x, exact, sound = tokens(n * C, dtype)
    keep = Coefficients(None, jnp.ones((n, N)), jnp.asarray(np.tile(np.eye(n, dtype=np.float32)[..., None], N)))
    phi, alpha, bias = jnp.zeros((n * C, n * n + 2 * n)), jnp.ones(3), jnp.zeros(n * n + 2 * n)
    with mhc_kernels.settings(**FORMS[form]):
        run = functools.partial(write_read, num_streams=n, num_iters=2)
        new, c, h = jax.jit(run)(x, keep, jnp.zeros((N, C), dtype), phi, alpha, bias)
    np.testing.assert_allclose(np.asarray(new, np.float64), exact, rtol=0, atol=1e-39)  # 1e-40 may be flushed to 0
    for value in c:
        assert (np.isfinite(np.asarray(value)).all(tuple(range(value.ndim - 1))) == sound).all()
    assert (np.isfinite(np.asarray(h, np.float32)).all(-1) == sound).all()


def norms(weight):
    return {
        "rms_norm": lambda x: rms_norm(x, weight, EPS),
        "stream_norm": lambda x: stream_norm(x, weight, 1, EPS)[:, 0],
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("norm", norms(None))
def test_norms(norm, dtype):
    x, exact, sound = tokens(C, dtype)
    out, (dx,) = pulled(norms(jnp.ones(C))[norm])((x,), jnp.ones(x.shape))
    assert_sound(out, normal(exact), sound, norm)
    assert np.isfinite(np.asarray(dx, np.float32)[sound]).all()


@pytest.mark.parametrize("norm", norms(None))
def test_the_gradient_of_a_norm_is_that_of_float64_up_to_the_overflow(norm):
    draw = np.random.default_rng(0)
    magnitudes = np.repeat([1e-30, 1.0, 1e13, 1e16, 1e18], 3)[:, None]
    x, g = ((m * draw.normal(size=(15, C))).astype(np.float32) for m in (magnitudes, 1.0))
    weight = draw.normal(size=C).astype(np.float32)
    v, wanted = x.astype(np.float64), (g * weight).astype(np.float64)
    scale = 1 / np.sqrt((v**2).mean(-1, keepdims=True) + EPS)
    expected = scale * (wanted - v * scale * (v * scale * wanted).mean(-1, keepdims=True))
    f = norms(jnp.asarray(weight))[norm]
    actual = jax.jit(lambda x: jax.vjp(f, x)[1](jnp.asarray(g))[0])(x)
    np.testing.assert_allclose(actual / scale, expected / scale, atol=1e-5)


def test_a_float16_stream_beyond_its_range_is_not_hidden():
    x = jnp.asarray([[1e5] * 4, [6e4] * 4], jnp.float32).astype(jnp.float16)
    out = np.asarray(rms_norm(x, jnp.ones(4), EPS))
    assert np.isnan(out[0]).all()
    np.testing.assert_allclose(out[1], 1, rtol=1e-6)


def test_rms_of_diagnostics_is_finite_where_its_numbers_are():
    size = jax.jit(lambda x: root_mean_square(x, (0, 1)))
    for magnitude in (0.0, 1e-30, 1.0, 1e19, 3e38):
        assert float(size(jnp.full((64, 16), magnitude))) == pytest.approx(magnitude, rel=1e-5)
    for bad in (np.inf, np.nan):
        assert not np.isfinite(float(size(jnp.ones((64, 16)).at[0, 1].set(bad))))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


def test_a_run_that_overflows_has_diverged_at_that_step(text, tmp_path):
    """rsqrt(inf) = 0 would let it finish, with a loss of exactly ln V and a gradient of exactly 0."""
    rate = {"learning_rate": 100.0, "grad_clip": 0.0, "schedule": "constant"}
    config = tiny(text, "hc:num_streams=2", model={"num_layers": 4}, optimizer=rate, train={"steps": 8})
    summary = train(config, tmp_path / "run")
    logged = lines(tmp_path / "run", "train")
    assert summary["status"] == "diverged"
    assert summary["first_nonfinite_step"] == logged[-1]["step"] < 8
    assert logged[-1]["loss"] is None
    assert 0 not in [line["grad_norm"] for line in logged]


class Unlucky(Data):
    """Data whose validation batches, or whose sequence of diagnostics, hold ids without an embedding, which give NaN."""

    where = "validation"

    def validation_batches(self, count, rows=None):
        batches = super().validation_batches(count, rows)
        if (rows is None) == (self.where == "validation"):
            batches = [{**batch, "inputs": np.full_like(batch["inputs"], 1 << 20)} for batch in batches]
        return batches


@pytest.mark.parametrize(("where", "step"), [("validation", 4), ("diagnostics", 0)])
def test_what_is_not_finite_beside_the_train_step_diverges_too(where, step, text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Unlucky, "where", where)
    config = tiny(text, "residual", train={"validate_every": 4, "diagnostics_every": 3, "checkpoint_every": 0})
    data = Unlucky(**vars(load_data(config.data)))
    summary = train(config, tmp_path / "run", data=data)
    assert (summary["status"], summary["first_nonfinite_step"], summary["steps"]) == ("diverged", step, step)
    assert [(e["event"], e["step"]) for e in lines(tmp_path / "run", "event")] == [("diverged", step)]
    assert f"the state of step {step} is saved, all of it finite" in capsys.readouterr().err
    (tmp_path / "run" / "summary.json").unlink()  # killed before it was written
    again = train(config, tmp_path / "run", data=data)
    assert (again["status"], again["first_nonfinite_step"]) == ("diverged", step)


def test_a_state_that_is_not_finite_is_not_called_finite(text, tmp_path, capsys):
    config = tiny(text, "residual", model={"embedding_init_std": 3e38})
    assert train(config, tmp_path / "run")["status"] == "diverged"
    assert "not all of it finite" in capsys.readouterr().err
