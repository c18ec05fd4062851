"""Weights of other libraries: Hugging Face's models and DeepSeek-V4's connections, both ways, and what is refused."""

import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from support import golden_values
from support.decoders import TOKENS, decoder_of, drawn_decoder
from support.in_process import run_here
from support.tiny_runs import ROOT
from support.tolerances import GOLDEN, assert_close

from mhc_jax import Wiring
from mhc_jax.config import ExperimentConfig
from mhc_jax.connections import KINDS, convert
from mhc_jax.data.tokenizers import ByteTokenizer, hugging_face_tokenizer
from mhc_jax.errors import InputError
from mhc_jax.files.json_files import read_json
from mhc_jax.generation import Generator
from mhc_jax.model import Decoder
from mhc_jax.runs.trained import load_trained
from mhc_jax.weights import folder as folders
from mhc_jax.weights import llama
from mhc_jax.weights.tensor_files import TensorFiles, flattened, write_folder

THEIRS = Path(golden_values.__file__).parent / "golden"
MODELS = ("mistral", "qwen3")


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A model folder of each golden model, made by the script."""
    out = tmp_path_factory.mktemp("models")
    for name in MODELS:
        status, _, error = run_here("convert", THEIRS / name, out / name)
        assert (status, error) == (0, "")
    return out


@pytest.mark.parametrize("name", MODELS)
def test_a_hugging_face_model_gives_its_logits_and_its_text(converted, name):
    expected = golden_values.load(f"{name}/expected")
    model = load_trained(converted / name)
    logits, _ = jax.jit(Decoder(model.config.model).apply)({"params": model.params}, jnp.asarray(expected["ids"]))
    assert_close(logits, expected["logits"], GOLDEN)
    prompt = [*model.tokenizer.start, *model.tokenizer.encode("KING HENRY: naïve, I will").tolist()]
    generator = Generator(model.config.model, model.params, 128, model.config.model.vocab_size)
    assert [*prompt, *generator.generate([prompt], 64)[0]] == expected["greedy"].tolist()
    assert model.config.data.sequence_length == {"mistral": 100, "qwen3": 128}[name]  # Mistral's sliding window


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_is_bitwise(converted, name, tmp_path):
    status, out, _ = run_here("convert", converted / name, tmp_path / "back", "--to=hf", "--dtype=bfloat16")
    assert status == 0
    assert "with its tokenizer" in out
    there, back = TensorFiles(THEIRS / name), TensorFiles(tmp_path / "back")
    assert there.shapes == back.shapes
    for key, shape in there.shapes.items():
        a, b = there.take(key, shape), back.take(key, shape)
        assert a.dtype == b.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(a.view(np.uint16), b.view(np.uint16))
    old, new = read_json(THEIRS / name / "config.json"), read_json(tmp_path / "back" / "config.json")
    same = {
        "vocab_size",
        "hidden_size",
        "head_dim",
        "rms_norm_eps",
        "tie_word_embeddings",
        "eos_token_id",
        "bos_token_id",
    }
    same |= {"rope_parameters", "num_key_value_heads", "intermediate_size", "num_hidden_layers", "hidden_act"}
    assert {key: old[key] for key in same} == {key: new[key] for key in same}
    assert new["model_type"] == {"mistral": "llama", "qwen3": "qwen3"}[name]
    assert llama.model_config(new) == llama.model_config(old)
    one, other = (hugging_face_tokenizer(folder) for folder in (THEIRS / name, tmp_path / "back"))
    assert (one.fingerprint, one.start, one.end_of_document) == (other.fingerprint, other.start, other.end_of_document)


@pytest.mark.parametrize("name", MODELS)
def test_tokens_stand_for_the_bytes_of_their_text(name):
    tokenizer, text = hugging_face_tokenizer(THEIRS / name), "Now is the wınter\n\nof our 🙂 discontent"
    ids = tokenizer.encode(text)
    space = name == "mistral"  # SentencePiece puts a space before a text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode()) + space
    assert tokenizer.decode(ids) == text
    assert tokenizer.start == ((1,) if space else ())


def hf(folder: Path, change) -> Path:
    """A copy of the golden Qwen3 with another config.json or other arrays: `change` gets both as dicts."""
    shutil.copytree(THEIRS / "qwen3", folder)
    settings, arrays = read_json(folder / "config.json"), load_file(folder / "model.safetensors")
    change(settings, arrays)
    (folder / "config.json").write_text(json.dumps(settings))
    save_file(arrays, folder / "model.safetensors")
    return folder


def _fp8(_, arrays):
    arrays["model.norm.weight"] = arrays["model.norm.weight"].astype(ml_dtypes.float8_e4m3fn)


REFUSED = [
    (lambda s, a: a.pop("model.layers.1.mlp.up_proj.weight"), r"layers.1.mlp.up_proj.weight is missing .* \[40, 24\]"),
    (lambda s, a: a.update({"model.norm.weight": np.ones(3, np.float32)}), r"shape \[3\], and \[24\] was expected"),
    (lambda s, a: a.update(more=np.ones(3, np.float32)), "1 arrays that have no place in the decoder, such as more"),
    (_fp8, "model.norm.weight .* F8_E4M3, and not of"),
    (lambda s, a: s.update(model_type="gpt2"), "the architecture 'gpt2'; .* llama, mistral, qwen3"),
    (lambda s, a: s.update(attention_bias=True), "attention_bias to True"),
    (lambda s, a: s.update(rope_parameters={"rope_type": "llama3"}), "rope_scaling to 'llama3'"),
    (lambda s, a: s.update(hidden_act="gelu"), "hidden_act to 'gelu'"),
    (lambda s, a: s.pop("head_dim"), "head_dim = None; it must be a positive integer"),
    (lambda s, a: s.update(tie_word_embeddings=False), r"lm_head.weight is missing .* \[300, 24\]"),
    (lambda s, a: a.update({"lm_head.weight": np.ones((300, 24), np.float32)}), "tied .* lm_head.weight differs"),
    (lambda s, a: s.update(vocab_size=200), "has 300 tokens, and its config.json says 200"),
]


@pytest.mark.parametrize(("change", "sentence"), REFUSED, ids=range(len(REFUSED)))
def test_models_that_do_not_fit_are_told(tmp_path, change, sentence):
    status, _, error = run_here("convert", hf(tmp_path / "theirs", change), tmp_path / "out")
    assert status == 2
    with pytest.raises(InputError, match=sentence):
        raise InputError(error)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("sizes", [True, False], ids=["now", "as an earlier version wrote it"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_one_flipped_bit_of_a_written_folder_is_told(name, sizes, tmp_path):
    write_folder(tmp_path / "a", {"w": np.ones(300, np.float32)}, {"config.json": {"width": 1}}, {})
    assert TensorFiles(tmp_path / "a").shapes == {"w": (300,)}
    listed = tmp_path / "a" / "checksums.json"
    found = json.loads(listed.read_text())
    listed.write_text(json.dumps(found if sizes else {file: sha for file, (_, sha) in found.items()}))
    assert TensorFiles(tmp_path / "a").shapes == {"w": (300,)}
    content = bytearray((tmp_path / "a" / name).read_bytes())
    content[-9] ^= 1
    (tmp_path / "a" / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name} is damaged: its SHA-256 .* remove .*checksums.json to use"):
        TensorFiles(tmp_path / "a")
    (tmp_path / "a" / "checksums.json").unlink()
    assert TensorFiles(tmp_path / "a").shapes == {"w": (300,)}


def test_two_folders_of_one_model_have_the_same_bytes(tmp_path):
    texts = {name: f'ünïcode 🙂 "quoted"\\ \t\n\x01\x7f/{name}' for name in "fbdaceg"}
    arrays = {"W": np.arange(6, dtype=np.float32).reshape(2, 3).T, "b": np.ones(3, np.float16)}
    for number in range(2):
        write_folder(tmp_path / str(number), arrays, {}, texts)
    path, other = (tmp_path / str(number) / "model.safetensors" for number in range(2))
    with safe_open(path, "numpy") as file:
        assert file.metadata() == texts
        for name, array in arrays.items():
            np.testing.assert_array_equal(file.get_tensor(name), array)
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    assert list(json.loads(content[8 : 8 + size])["__metadata__"]) == sorted(texts)
    assert content == other.read_bytes()


def test_damaged_and_missing_files_are_told(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"no safetensors" * 3)
    with pytest.raises(InputError, match="not a whole safetensors file"):
        TensorFiles(tmp_path)
    with pytest.raises(InputError, match=r"model.safetensors cannot be read: No such file"):
        TensorFiles(tmp_path / "nowhere")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    with pytest.raises(InputError, match=r"model-1.safetensors cannot be read"):
        TensorFiles(tmp_path)
    with pytest.raises(InputError, match="exists and is not empty"):
        write_folder(tmp_path, {}, {}, {})
    assert run_here("convert", tmp_path / "nowhere", tmp_path / "out")[0] == 2


@pytest.mark.parametrize("kind", ["hc", "mhc"])
def test_a_model_folder_is_the_model(tmp_path, kind):
    config = decoder_of(kind)
    params = drawn_decoder(config)
    folders.write_model(tmp_path / "m", ExperimentConfig(model=config), params, ByteTokenizer(), 7)
    model = load_trained(tmp_path / "m")
    assert (model.step, model.config.model, model.tokenizer.fingerprint) == (7, config, ByteTokenizer.fingerprint)
    jax.tree.map(np.testing.assert_array_equal, model.params, params)
    with pytest.raises(InputError, match=f"the connection '{kind}', and the Llama family has residual"):
        llama.to_hugging_face(params, config)


@pytest.mark.parametrize("spec", [*KINDS, "mhc:exit=head"])
def test_a_connection_leaves_the_decoder(tmp_path, spec):
    """Exported parameters have the tree that `Wiring` needs, and branch 2 i + 1 is the feed-forward of block i."""
    config = decoder_of(spec, experts="4:active=2:width=8")  # one dense block in front
    params = drawn_decoder(config)
    wiring, made = Wiring(spec, config.width, config.num_sublayers), folders.wiring_params(params)
    wanted = jax.eval_shape(lambda: wiring.init(jax.random.key(0), stacked=True))
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(lambda a: a.shape, wanted)
    if not jax.tree.leaves(made):
        with pytest.raises(InputError, match="has no parameters"):
            folders.write_connection(tmp_path / "c", wiring, made)
        return
    for name, a in flattened(made["branches"]).items():
        np.testing.assert_array_equal(a[1], flattened(params["dense_layers"]["mlp_connection"])[name][0])
        np.testing.assert_array_equal(a[4], flattened(params["layers"]["attention_connection"])[name][1])
    folders.write_connection(tmp_path / "c", wiring, made)
    again, read = folders.read_connection(tmp_path / "c")
    assert again == wiring
    jax.tree.map(np.testing.assert_array_equal, read, made)


def v4_folder(folder: Path, dtype=ml_dtypes.bfloat16, **more) -> dict:
    """DeepSeek-V4's connections of 3 blocks among other arrays, in two shards; returned as float32."""
    params = drawn_decoder(decoder_of("mhc:eps_convention=v4:exit=head:num_streams=2"))
    weights = {f"model.{name}": a.astype(dtype) for name, a in convert.to_deepseek_v4(params).items()}
    weights |= {
        "model.embed.weight": np.ones((3, 2), np.float32),
        "mtp.0.hc_attn_fn": np.ones((8, 32), np.float32),
        **more,
    }
    names, folder_map = sorted(weights), {}
    folder.mkdir()
    for shard, part in (("a.safetensors", names[::2]), ("b.safetensors", names[1::2])):
        save_file({name: np.ascontiguousarray(weights[name]) for name in part}, folder / shard)
        folder_map |= dict.fromkeys(part, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": folder_map}))
    return {name.removeprefix("model."): np.asarray(a, np.float32) for name, a in weights.items()}


def test_deepseek_v4s_connections_are_read_from_shards(tmp_path):
    weights = v4_folder(tmp_path / "v4")
    status, out, error = run_here("convert", tmp_path / "v4", tmp_path / "c", "--to=connection")
    assert (status, error) == (0, "")
    assert "mtp.0.hc_attn_fn" in out
    wiring, params = folders.read_connection(tmp_path / "c")
    assert (wiring.spec, wiring.width, wiring.num_branches) == ("mhc:eps_convention=v4:exit=head:num_streams=2", 16, 6)
    expected = folders.wiring_params(convert.from_deepseek_v4(weights, 3, 2, 16))
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    y = wiring.apply(params, [jnp.tanh] * 6, jnp.ones((2, 3, 16)))
    assert np.isfinite(y).all()


def test_connections_that_cannot_be_read_are_told(tmp_path):
    v4_folder(tmp_path / "fp8", ml_dtypes.float8_e4m3fn)
    for folder, sentence in (
        (tmp_path / "fp8", "F8_E4M3, and not of"),
        (THEIRS / "qwen3", "no array hc_head_fn"),
    ):
        status, _, error = run_here("convert", folder, tmp_path / "c", "--to=connection")
        assert status == 2
        assert sentence in error


def test_the_example_of_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "weights.md").read_text(), re.DOTALL)
    values = {}
    exec(code, values)
    assert values["y"].shape == (2, 8, 16)
    assert "spec" in json.loads((tmp_path / "connection" / "connection.json").read_text())


def test_the_decoder_with_norms_of_queries_and_keys_is_causal_under_a_cache():
    """Generation and the whole pass agree with q and k norms, and the setting is refused with latent attention."""
    config = decoder_of("residual", qk_norm=True, rope_theta=100.0, norm_eps=1e-5)
    params = drawn_decoder(config)
    logits, _ = Decoder(config).apply({"params": params}, TOKENS[:1])
    made = Generator(config, params, 12, 31).generate([TOKENS[0, :11].tolist()], 1)
    assert made == [[int(logits[0, 10].argmax())]]
    assert jax.tree.map(jnp.shape, params["layers"]["attention"]["q_norm"]) == {"weight": (3, 8)}
    with pytest.raises(InputError, match=r"qk_norm is True, and model.attention_kind is 'mla'"):
        decoder_of("residual", qk_norm=True, attention_kind="mla")
