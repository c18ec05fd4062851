"""Convert the weights of a model or of its connection into another form.

    python experiments/convert.py ~/SmolLM2-135M models/smollm2               # Hugging Face -> model folder
    python experiments/convert.py runs/demo/residual models/hf --to=hf        # run -> Hugging Face
    python experiments/convert.py runs/demo/mhc models/mhc --to=model         # run -> model folder
    python experiments/convert.py runs/demo/mhc models/phi --to=connection    # the connection alone
    python experiments/convert.py ~/DeepSeek-V4 models/v4 --to=connection     # the connections of DeepSeek-V4

The first argument is a run folder, a model folder, or a folder that Hugging Face's library has saved as safetensors.  The second
argument is a new folder.  A model folder holds config.json, model.safetensors and tokenizer.json.  generate.py, evaluate.py and
--config.train.init_from take it in the place of a run folder (docs/weights.md).
"""

from pathlib import Path
from typing import Any

import jax
from absl import flags

from mhc_jax import cli
from mhc_jax.config import ExperimentConfig
from mhc_jax.connections import spec
from mhc_jax.data.tokenizers import hugging_face_files, hugging_face_tokenizer
from mhc_jax.errors import require, user_path
from mhc_jax.files.json_files import read_json
from mhc_jax.runs.trained import Trained, load_trained
from mhc_jax.weights import folder as folders
from mhc_jax.weights import llama
from mhc_jax.weights.tensor_files import TensorFiles, require_free, write_folder
from mhc_jax.wrappers.wiring import Wiring

TO = flags.DEFINE_enum("to", "model", ["model", "hf", "connection"], "Form of the result.")
DTYPE = flags.DEFINE_enum("dtype", "float32", list(llama.DTYPES), "Dtype of the weights, with --to=hf.")


def main(source: str, destination: str) -> int:
    """Convert the folder `source`, print what was written, and return the exit status."""
    given, out = user_path(source), user_path(destination)
    require(given.is_dir(), f"There is no folder {source!r}; give a run, a converted model or a Hugging Face model.")
    require_free(out)
    require(DTYPE.value == "float32" or TO.value == "hf", "--dtype is for --to=hf; the other forms are float32.")
    foreign = folders.is_hugging_face_folder(given) or not (given / "config.json").exists()
    if TO.value == "connection":
        wiring, params = _foreign_connection(given) if foreign else _own_connection(load_trained(given))
        folders.write_connection(out, wiring, params)
        print(f"{out}: {wiring.spec}, {wiring.num_branches} sub-layers of width {wiring.width}.")
    elif foreign:
        require(
            TO.value == "model", f"{source} is a Hugging Face model already; --to=model makes a model folder of it."
        )
        print(_from_hugging_face(given, out))
    else:
        print(_own_model(load_trained(given), out))
    return 0


def _from_hugging_face(given: Path, out: Path) -> str:
    settings = read_json(given / "config.json")
    config, tokenizer = llama.model_config(settings), hugging_face_tokenizer(given)
    require(
        tokenizer.vocab_size <= config.vocab_size,
        f"The tokenizer of {given} has {tokenizer.vocab_size} tokens, and its config.json says {config.vocab_size}.",
    )
    context = llama.context_length(settings)
    data = {"tokenizer": f"hf:{out}", "sequence_length": context}
    whole = ExperimentConfig(model=config).with_settings(data=data)
    params = llama.from_hugging_face(TensorFiles(given), config)
    folders.write_model(out, whole, params, tokenizer, 0)
    return f"{out}: {settings['model_type']}, {_count(params)} parameters, sequences of at most {context} tokens."


def _own_model(model: Trained, out: Path) -> str:
    if TO.value == "model":
        folders.write_model(out, model.config, jax.device_get(model.params), model.tokenizer, model.step)
        return f"{out}: {spec(model.config.model.connection)}, {_count(model.params)} parameters."
    config, tokenizer = model.config.model, model.tokenizer
    weights = llama.to_hugging_face(jax.device_get(model.params), config, DTYPE.value)
    start = tokenizer.start[0] if tokenizer.start else None
    described = llama.hugging_face_config(
        config, model.config.data.sequence_length, tokenizer.end_of_document, start, DTYPE.value
    )
    files = hugging_face_files(tokenizer)
    write_folder(out, weights, {"config.json": described, **files}, {"format": "pt"})
    note = "with its tokenizer" if files else "without its byte tokenizer, which has no file in that form"
    return f"{out}: {described['architectures'][0]}, {_count(model.params)} parameters in {DTYPE.value}, {note}."


def _own_connection(model: Trained) -> tuple[Wiring, Any]:
    config = model.config.model
    wiring = Wiring(spec(config.connection), config.width, config.num_sublayers)
    return wiring, folders.wiring_params(jax.device_get(model.params))


def _foreign_connection(given: Path) -> tuple[Wiring, Any]:
    wiring, params, left_out = folders.deepseek_v4_connection(given)
    if left_out:
        print(f"{len(left_out)} arrays are left out, such as {left_out[0]}: they are not of the blocks or the head.")
    return wiring, params


def _count(params: Any) -> str:
    return f"{sum(a.size for a in jax.tree.leaves(params)):,}"


if __name__ == "__main__":
    cli.main(main, positional=("SOURCE", "DESTINATION"))
