"""`s2d-jax preflight`: compiles a config's largest programs and says whether they fit.

Needs the two model folders' config.json and tokenizer, no weights and no data. With `--topology` it
compiles for a TPU or GPU that is not here. One file per subject: `commands` has the command line,
`programs` compiles a config, `runs` counts how often they run, `topologies` has the chips, `costs`
one program's memory and time, `hlo` reads a compiled program with `operations`, `loops`,
`products`, `collectives` and `traffic`. `overlap` says which messages wait for nothing, `verdicts`
prints, and `search` compares meshes.
"""

from s2d_jax.preflight.commands import main, show
from s2d_jax.preflight.programs import abstract_role, costs_of

__all__ = ["abstract_role", "costs_of", "main", "show"]
