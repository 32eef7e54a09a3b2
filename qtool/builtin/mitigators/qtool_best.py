"""Our own combinations, one for integers and one for FP4.

Measured on SmolLM2-135M (``recipes/README.md``).

Both start from GPTQ, whose codes a block's output then improves by learned rounding and ranges: the block's output is
what counts, but its error has many minima, and the solution of the layers' problems is a good place to start from. At
the end the output of the whole model moves what codes are multiplied with, which no block can see.
"""

from __future__ import annotations

from qtool.engine.composition import Composition

BEST_INT4 = Composition("gptq+autoround+e2e-qp", {"autoround.widest": "1.2", "e2e-qp.norm_rate": "0.01"})
BEST_FP4 = Composition("gptq+autoround+e2e-qp", {"gptq.clip_ceiling": "1.75", "autoround.widest": "1.5"})
