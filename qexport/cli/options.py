"""Arguments and options, each said once, with what the shell completes for them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from qexport import plugins
from qexport.evaluate.presets import PRESETS as TASKS
from qexport.formats.kv._presets import NONE, PRESETS
from qexport.recipe import recipe_names


def _starting(words: Callable[[], Sequence[str]]) -> Callable[[str], list[str]]:
    return lambda incomplete: [word for word in words() if word.startswith(incomplete)]


complete_recipe = _starting(recipe_names)
complete_format = _starting(lambda: plugins.names("formats"))
complete_input = _starting(lambda: ["none", *plugins.names("inputs")])
complete_transform = _starting(lambda: plugins.names("transforms"))
complete_target = _starting(lambda: [name.replace("_", "-") for name in plugins.names("export")])
complete_reader = _starting(lambda: ["vllm", "llama.cpp", *(n.replace("_", "-") for n in plugins.names("export"))])
complete_calibration = _starting(lambda: ["self", "builtin", "wikitext2", "c4", "pile", "hf:"])
complete_text = _starting(lambda: ["builtin", "wikitext2", "c4", "c4-new"])
complete_tasks = _starting(lambda: list(TASKS))
complete_sort = _starting(lambda: ["bits", "size", "perplexity", "kl", "top1", "tasks", "speed"])
complete_kv = _starting(lambda: [*PRESETS, NONE])
complete_bos = _starting(lambda: ["auto", "always", "never"])
complete_eval_bos = _starting(lambda: ["auto", "always", "never", "once"])
complete_backend = _starting(lambda: ["auto", "triton", "cpu", "reference"])


# ---- options that several commands share -------------------------------------------------------

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")]
Token = Annotated[str | None, typer.Option(help="Access token for the Hub; otherwise the one you logged in with.")]
Checkpoint = Annotated[str, typer.Argument(metavar="DIR", help="A folder that `qexport quantize` wrote.")]
Bos = Annotated[
    str,
    typer.Option(
        help="BOS before each sequence: auto follows the tokenizer, always, never.", autocompletion=complete_bos
    ),
]
EvalBos = Annotated[
    str,
    typer.Option(
        "--bos",
        help="BOS before each window: auto follows the tokenizer, always, never; once: before the text, as in GPTQ.",
        autocompletion=complete_eval_bos,
    ),
]
Texts = Annotated[
    list[str] | None,
    typer.Option(
        "--text",
        help="File, builtin (the default), wikitext2, c4 or c4-new; may be repeated.",
        autocompletion=complete_text,
    ),
]
Tasks = Annotated[
    str | None,
    typer.Option(
        help="Tasks of lm-eval, with commas, or csqa, mmlu, gsm8k, truthfulqa, bbh.", autocompletion=complete_tasks
    ),
]
Device = Annotated[str, typer.Option(help="Where to compute: auto, cpu, cuda, cuda:1 ...")]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16, float16; default: float32 on a CPU, as stored elsewhere.")
]
EvalDevice = Annotated[str | None, typer.Option(help="Where to compute; default: a GPU if there is one.")]
JobDtype = Annotated[str, typer.Option("--dtype", help="What to compute in: float32, bfloat16, float16.")]
Backend = Annotated[str, typer.Option(help="Kernels: auto, triton, cpu, reference.", autocompletion=complete_backend)]
CacheGb = Annotated[
    float, typer.Option(help="Memory for decoded layers on CPU; 0 keeps everything packed.", min=0, max=1e6)
]
Kv = Annotated[
    str | None,
    typer.Option(
        "--kv",
        metavar="NAME",
        help="The key-value cache: kivi-2bit, kvquant-3bit ..., or none.",
        autocompletion=complete_kv,
    ),
]
Model = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="Hub id, folder or .gguf file; left out: the demo model.", show_default=False),
]
Method = Annotated[
    str | None,
    typer.Option("--method", "-m", help="A recipe; `qexport methods` lists them.", autocompletion=complete_recipe),
]
RecipeFile = Annotated[Path | None, typer.Option("--recipe", help="A recipe of your own, a TOML file.")]
FormatName = Annotated[
    str | None,
    typer.Option("--format", help="Store in another format than the recipe's.", autocompletion=complete_format),
]
InputName = Annotated[
    str | None,
    typer.Option(
        "--input",
        help="Round the linears' inputs to integers too: token, tensor, sdr, outliers; none.",
        autocompletion=complete_input,
        metavar="NAME",
    ),
]
Transforms = Annotated[
    list[str] | None,
    typer.Option(
        "--transform",
        "-t",
        help="Prepare the weights first: awq, rotation, smoothquant; may be given again.",
        autocompletion=complete_transform,
        metavar="NAME",
    ),
]
Bits = Annotated[int | None, typer.Option(help="Bits of a code. Scales and zeros come on top.", min=1, max=16)]
GroupSize = Annotated[
    int | None, typer.Option(help="Weights along k that share a scale; -1 is per channel.", min=-1, max=2**31 - 1)
]
Symmetric = Annotated[
    bool | None, typer.Option("--sym/--asym", help="Without or with a zero point.", show_default=False)
]
Ignore = Annotated[list[str] | None, typer.Option(help="Leave modules that fit PATTERN dense.", metavar="PATTERN")]
Override = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="Another value for modules that fit, e.g. '*.down_proj:bits=4'.", metavar="PATTERN:KEY=VALUE"
    ),
]
Setting = Annotated[
    list[str] | None,
    typer.Option("-s", help="An option of recipe, method, format, input, kv ..., e.g. damp=0.02.", metavar="KEY=VALUE"),
]
LmHead = Annotated[
    int | None,
    typer.Option(help="Bits of the output layer; 0, the usual, leaves it dense.", metavar="BITS", min=0, max=16),
]
Embeddings = Annotated[
    int | None,
    typer.Option(help="Bits of the token embedding, 2 to 8; 0, the usual, leaves it dense.", metavar="BITS", min=0),
]
KvName = Annotated[
    str | None,
    typer.Option(
        "--kv",
        help="Store cached keys and values in few bits: kivi-4bit, kvquant-3bit ...; none. Without --method: add it to "
        "a folder that qexport packed, in place.",
        autocompletion=complete_kv,
        metavar="NAME",
    ),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        help="self (the default: the model writes it), builtin, wikitext2, c4, pile, hf:ID or a text or jsonl file.",
        autocompletion=complete_calibration,
    ),
]
Samples = Annotated[int, typer.Option(help="Calibration sequences.", min=1)]
Seqlen = Annotated[int, typer.Option(help="Tokens of a sequence.", min=2)]
Seed = Annotated[int, typer.Option(help="Seed of all that is random.", min=0, max=2**63 - 1)]
