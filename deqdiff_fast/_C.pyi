# C++ core: solver memory and CPU kernels. Tensors are passed as addresses; see csrc/calls.h.
# dtype: 0 float32, 1 float64, 2 bfloat16. Coefficients, sums and Gram matrices: float64. lo, hi, filled: int32.
from collections.abc import Sequence

__version__: str

def build_info() -> dict[str, str | int]: ...
def ddim_update(
    dtype: int,
    states_ptr: int,
    predictions_ptr: int,
    state_coef_ptr: int,
    model_coef_ptr: int,
    drift_ptr: int,
    lo_ptr: int,
    hi_ptr: int,
    sq_diff_ptr: int,
    sq_norm_ptr: int,
    T: int,
    B: int,
    D: int,
    L: int,
    threads: int,
) -> None: ...
def anderson_step(
    dtype: int,
    states_ptr: int,
    predictions_ptr: int,
    state_coef_ptr: int,
    model_coef_ptr: int,
    drift_ptr: int,
    lo_ptr: int,
    hi_ptr: int,
    sq_diff_ptr: int,
    sq_norm_ptr: int,
    f_ptr: int,
    g_ptr: int,
    gram_ptr: int,
    filled_ptr: int,
    T: int,
    B: int,
    D: int,
    L: int,
    M: int,
    W: int,
    column: int,
    scope: int,
    ridge: float,
    relative_ridge: bool,
    damping: float,
    stale: float,
    threads: int,
) -> None: ...
def newton_scan(
    dtype: int,
    states_ptr: int,
    predictions_ptr: int,
    state_coef_ptr: int,
    model_coef_ptr: int,
    drift_ptr: int,
    slope_ptr: int,
    slope_per_element: bool,
    lo_ptr: int,
    hi_ptr: int,
    sq_diff_ptr: int,
    sq_norm_ptr: int,
    z_ptr: int,
    e_ptr: int,
    filled_ptr: int,
    T: int,
    B: int,
    D: int,
    L: int,
    ring: int,
    W: int,
    column: int,
    ridge: float,
    floor: float,
    threads: int,
) -> None: ...
def draft_secants(
    dtype: int,
    states_ptr: int,
    predictions_ptr: int,
    made_ptr: int,
    at_ptr: int,
    lo_ptr: int,
    hi_ptr: int,
    z_ptr: int,
    rest_ptr: int,
    filled_ptr: int,
    weights_ptr: int,
    T: int,
    A: int,
    B: int,
    D: int,
    ring: int,
    column: int,
    ridge: float,
    floor: float,
    threads: int,
) -> None: ...
def draft_scan(
    dtype: int,
    states_ptr: int,
    predictions_ptr: int,
    said_ptr: int,
    made_ptr: int,
    turn_ptr: int,
    shares_ptr: int,
    state_coef_ptr: int,
    model_coef_ptr: int,
    drift_ptr: int,
    slope_ptr: int,
    slope_per_element: bool,
    lo_ptr: int,
    hi_ptr: int,
    sq_diff_ptr: int,
    sq_norm_ptr: int,
    carry_ptr: int,
    z_ptr: int,
    rest_ptr: int,
    weights_ptr: int,
    T: int,
    A: int,
    B: int,
    D: int,
    L: int,
    ring: int,
    column: int,
    number: int,
    previous: int,
    start: int,
    stop: int,
    charting: bool,
    threads: int,
) -> None: ...
def inverse_scan(
    dtype: int,
    states_ptr: int,
    predictions_ptr: int,
    state_coef_ptr: int,
    model_coef_ptr: int,
    drift_ptr: int,
    slope_ptr: int,
    slope_per_element: bool,
    weight_ptr: int,
    weight_per_element: bool,
    lo_ptr: int,
    hi_ptr: int,
    sq_miss_ptr: int,
    z_ptr: int,
    e_ptr: int,
    filled_ptr: int,
    T: int,
    B: int,
    D: int,
    L: int,
    ring: int,
    W: int,
    column: int,
    damping: float,
    ridge: float,
    stale: float,
    floor: float,
    reach: float,
    threads: int,
) -> None: ...
def judge_steps(
    sq_diff_ptr: int,
    sq_norm_ptr: int,
    previous_ptr: int,
    strict_ptr: int,
    T: int,
    B: int,
    freeze: float,
    floor: float,
) -> None: ...

class Lease:
    @property
    def released(self) -> bool: ...
    @property
    def generation(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def release(self) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

class Arena:
    def __init__(self, byte_budget: int) -> None: ...
    @staticmethod
    def plan(request: Sequence[tuple[str, int]]) -> tuple[dict[str, int], int]: ...
    def lease(self, total_bytes: int) -> Lease: ...
    def stats(self) -> dict[str, int]: ...
    def set_poison(self, on: bool) -> None: ...
    def trim(self) -> None: ...
