"""What targets that know nothing but integers in groups have in common."""

from qexport.export.base import Module
from qexport.formats.uniform import Uniform


def uniform_only(module: Module) -> str | None:
    """Why a module is not an ordinary linear in format `uniform`; None if it is."""
    if module.kind == "embedding":
        return "it is an embedding, and only linears can be quantized there. Leave out --embeddings"
    if module.kind == "expert":
        return "it is one expert of a stack, which has no place of its own there. Leave experts dense with --ignore"
    if not isinstance(module.spec.weight, Uniform):
        return (
            f'format "{module.spec.weight.name}" has no counterpart there. Use --method rtn, gptq or awq, whose '
            "format is uniform, or --to dense"
        )
    steps = module.spec.input
    done = [
        word for word, on in (("scaled", steps.scale), ("rotated", steps.hadamard), ("sorted", steps.permute)) if on
    ]
    if done:
        return (
            f"its input is {' and '.join(done)} when it runs, which cannot be said there. Leave out -t, "
            "and order=act, or use --to dense"
        )
    return None


def fitting_group(k: int) -> str:
    """A usual group size that divides k, as the option that asks for it."""
    return f"--group-size {next((g for g in (128, 64, 32) if k % g == 0), -1)}"
