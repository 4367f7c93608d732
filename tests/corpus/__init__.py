"""Small networks, one for every situation, with what must become of it."""

from __future__ import annotations

from tests.corpus.attention import ATTENTION
from tests.corpus.case import Case
from tests.corpus.convolutions import CONVOLUTIONS
from tests.corpus.inputs import INPUTS
from tests.corpus.modules import MODULES, REFUSED
from tests.corpus.recurrent import RECURRENT
from tests.corpus.streams import STREAMS
from tests.corpus.tables import TABLES

CORPUS: list[Case] = [
    *STREAMS,
    *CONVOLUTIONS,
    *ATTENTION,
    *RECURRENT,
    *TABLES,
    *MODULES,
    *INPUTS,
]

__all__ = ["CORPUS", "REFUSED", "Case"]
