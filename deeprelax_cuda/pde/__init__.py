"""The equations behind the optimizers, solved on grids of one and two dimensions.

Pure functions of numpy arrays; the packages they need are the ``pde`` extra, and nothing here is imported by
`import deeprelax_cuda`. docs/theory.md has the mathematics in the names used here.
"""

from deeprelax_cuda.pde.closed_forms import heated_cosine, relaxed_quadratic, widened
from deeprelax_cuda.pde.control import Controlled, control, value_function
from deeprelax_cuda.pde.fokker_planck import fokker_planck, generator
from deeprelax_cuda.pde.grid import Grid, Jet, differences
from deeprelax_cuda.pde.hamilton_jacobi import hamilton_jacobi, largest_step
from deeprelax_cuda.pde.heat import heat
from deeprelax_cuda.pde.landscapes import Landscape, double_well, rugged, valleys
from deeprelax_cuda.pde.local_entropy import local_entropy
from deeprelax_cuda.pde.moreau_envelope import lower_envelope, moreau_envelope

__all__ = [
    "Controlled",
    "Grid",
    "Jet",
    "Landscape",
    "control",
    "differences",
    "double_well",
    "fokker_planck",
    "generator",
    "hamilton_jacobi",
    "heat",
    "heated_cosine",
    "largest_step",
    "local_entropy",
    "lower_envelope",
    "moreau_envelope",
    "relaxed_quadratic",
    "rugged",
    "valleys",
    "value_function",
    "widened",
]
