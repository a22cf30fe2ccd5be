"""Models of transformers as qexport sees them: the only package that knows how they are built.

`open_source` finds a model and reads its tensors, `anatomy` says what is in it without reading any, `skeleton` runs it
one block at a time, `load_dense` loads all of it.
"""

from qexport.folders import cache_folder
from qexport.models.attention import Attention, attention_layers, heads_of, other_layers
from qexport.models.auto import read_config
from qexport.models.build import hollow
from qexport.models.chain import find_blocks
from qexport.models.demo import demo_model
from qexport.models.folds import Fold, find_folds
from qexport.models.linears import place
from qexport.models.mapping import tied_names
from qexport.models.parts import Anatomy, Block, LinearGroup, WeightView
from qexport.models.source import Source, load_dense, open_source
from qexport.models.stream import Stream, find_stream
from qexport.models.streaming import Skeleton, skeleton
from qexport.models.structure import anatomy
from qexport.models.turned import Turned

__all__ = [
    "Anatomy",
    "Attention",
    "Block",
    "Fold",
    "LinearGroup",
    "Skeleton",
    "Source",
    "Stream",
    "Turned",
    "WeightView",
    "anatomy",
    "attention_layers",
    "cache_folder",
    "demo_model",
    "find_blocks",
    "find_folds",
    "find_stream",
    "heads_of",
    "hollow",
    "load_dense",
    "open_source",
    "other_layers",
    "place",
    "read_config",
    "skeleton",
    "tied_names",
]
