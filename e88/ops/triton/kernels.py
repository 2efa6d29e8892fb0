"""The recurrence and its gradients as two Triton kernels.

Letters as in `e88.ops.contract`. A program owns BV columns of one head of one sequence and keeps its tile of the
state, [BK, BV] with K padded to BK, in registers: given k, q and the decay, columns know nothing of one another.

The forward kernel saves the state every SEGMENT steps. The backward kernel takes the segments from the last to the
first: it replays one from its saved state, writing every state and delta to scratch memory of its own, small enough
to stay in cache, then walks back through it. The sums of dq, dk, dg and dbeta over columns are this program's alone;
with more than one block of columns the caller adds them up.

Names: `i_` an index, `o_` offsets, `b_` a block in registers.

Triton lays a block out over lanes after the loads and stores that it meets. The state is loaded at the start also
where it is zero, and saved in panels of 4 columns, so that all these agree on 4 columns a lane and as many rows as
are left: few shuffles for sums either way, and no change of layout on the way.
"""

from __future__ import annotations

import triton
import triton.language as tl

# No compilation may depend on the sizes of a batch.
SIZES = ["T", "H", "tokens"]


@triton.jit
def _tanh(x: tl.tensor, MODE: tl.constexpr) -> tl.tensor:
    if MODE == "approximate":
        # One instruction of NVIDIA's, good to 5e-4: below the rounding of 16-bit inputs.
        y = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        # exp(2x) may overflow to infinity, which gives 1.
        y = 1.0 - 2.0 / (1.0 + tl.exp2(x * 2.8853900817779268))
        if MODE == "exact":
            # The difference above loses its digits near 0: there a minimax polynomial, good to 2e-8.
            u = x * x
            near = x + x * u * (-0.33333144 + u * (0.13325879 + u * (-0.0530455 + u * 0.0172415)))
            y = tl.where(u < 0.25, near, y)
    return y


@triton.jit
def _load(p: tl.tensor, inside: tl.tensor, FULL: tl.constexpr) -> tl.tensor:
    """A block as float32, zero outside; FULL says that all of it is inside."""
    if FULL:
        values = tl.load(p)
    else:
        values = tl.load(p, mask=inside, other=0.0)
    return values.to(tl.float32)


@triton.jit
def _store(p: tl.tensor, values: tl.tensor, inside: tl.tensor, FULL: tl.constexpr) -> None:
    values = values.to(p.dtype.element_ty)
    if FULL:
        tl.store(p, values)
    else:
        tl.store(p, values, mask=inside)


@triton.jit
def _step(
    b_s: tl.tensor, b_k: tl.tensor, b_v: tl.tensor, g: tl.tensor, gate: tl.tensor, TANH: tl.constexpr
) -> tl.tensor:
    """The delta [BV] and the next state [BK, BV]; `gate` is None for 1."""
    b_e = b_v - tl.sum(b_s * b_k[:, None], 0)
    b_w = b_e
    if gate is not None:
        b_w = gate * b_e
    b_s = tl.exp(g) * b_s + b_k[:, None] * b_w[None, :]
    if TANH is not None:
        b_s = _tanh(b_s, TANH)
    return b_e, b_s


@triton.jit
def _panels(o_k: tl.tensor, o_v: tl.tensor, ROWS: tl.constexpr) -> tl.tensor:
    """Offsets of a state stored as [columns / 4, ROWS, 4]."""
    return (o_v // 4 * (4 * ROWS) + o_v % 4)[None, :] + o_k[:, None] * 4


@triton.jit
def _sequence(ends: tl.tensor, i_n: tl.tensor, T: tl.tensor) -> tl.tensor:
    """Where sequence i_n begins among the tokens, and its length."""
    if ends is None:
        first, steps = i_n * T, T
    else:
        first = tl.load(ends + i_n)
        steps = (tl.load(ends + i_n + 1) - first).to(tl.int32)
    return first, steps


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    g: tl.tensor,
    beta: tl.tensor,
    ends: tl.tensor,
    state: tl.tensor,
    y: tl.tensor,
    saved: tl.tensor,
    q_row: tl.tensor,
    k_row: tl.tensor,
    v_row: tl.tensor,
    T: tl.tensor,
    H: tl.tensor,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    SEGMENT: tl.constexpr,
    TANH: tl.constexpr,
) -> None:
    """Outputs, the final state in place of the initial one, and where `saved` is given every SEGMENT-th state.

    q, k, v: [tokens, H, K or V] with heads packed and tokens q_row, k_row, v_row elements apart; g, beta: [tokens, H]
    float32; ends: [N + 1] or None; state: [N, H, K, V] float32; y: [tokens, H, V]; saved: [tokens // SEGMENT + N, H],
    each a padded state in panels. TANH: how to compute it, see `_tanh`, or None for the identity.
    """
    BLOCKS: tl.constexpr = (V + BV - 1) // BV
    FULL_K: tl.constexpr = K == BK
    FULL_V: tl.constexpr = V % BV == 0
    FULL: tl.constexpr = FULL_K and FULL_V
    pid = tl.program_id(0).to(tl.int64)
    i_v, i_nh = pid % BLOCKS, pid // BLOCKS
    i_n, i_h = i_nh // H, i_nh % H
    first, steps = _sequence(ends, i_n, T)

    o_k, o_v = tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    in_k, in_v = o_k < K, o_v < V
    inside = in_k[:, None] & in_v[None, :]
    o_state = i_nh * (K * V) + o_k[:, None] * V + o_v[None, :]
    b_s = _load(state + o_state, inside, FULL)
    SIZE: tl.constexpr = BLOCKS * BV * BK
    if saved is not None:
        saved += ((first // SEGMENT + i_n) * H + i_h) * SIZE
        o_saved = _panels(o_k, o_v, BK)
        b_saved = b_s
        if saved.dtype.element_ty == tl.float16:
            # A given state, unlike those after a tanh, may be out of range.
            b_saved = tl.clamp(b_s, -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(saved + o_saved, b_saved.to(saved.dtype.element_ty))

    q += first * q_row + i_h * K
    k += first * k_row + i_h * K
    v += first * v_row + i_h * V
    y += (first * H + i_h) * V
    g += first * H + i_h
    if beta is not None:
        beta += first * H + i_h
    if steps > 0:
        b_q, b_k = _load(q + o_k, in_k, FULL_K), _load(k + o_k, in_k, FULL_K)
        b_v, b_g = _load(v + o_v, in_v, FULL_V), tl.load(g)
        gate = None
        if beta is not None:
            gate = tl.load(beta)
        for i in range(steps):
            # The next step's inputs are on their way while this one is computed; the last step's are read again.
            more = (i + 1 < steps).to(tl.int32)
            q += more * q_row
            k += more * k_row
            v += more * v_row
            g += more * H
            next_q, next_k = _load(q + o_k, in_k, FULL_K), _load(k + o_k, in_k, FULL_K)
            next_v, next_g = _load(v + o_v, in_v, FULL_V), tl.load(g)
            if beta is not None:
                beta += more * H
                next_gate = tl.load(beta)
            b_e, b_s = _step(b_s, b_k, b_v, b_g, gate, TANH)
            _store(y + o_v, tl.sum(b_s * b_q[:, None], 0), in_v, FULL_V)
            y += H * V
            if saved is not None:
                if (i + 1) % SEGMENT == 0 and i + 1 < steps:
                    saved += H * SIZE
                    tl.store(saved + o_saved, b_s.to(saved.dtype.element_ty))
            b_q, b_k, b_v, b_g = next_q, next_k, next_v, next_g
            if beta is not None:
                gate = next_gate
    _store(state + o_state, b_s, inside, FULL)


@triton.jit(do_not_specialize=SIZES)
def backward_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    g: tl.tensor,
    beta: tl.tensor,
    ends: tl.tensor,
    saved: tl.tensor,
    dy: tl.tensor,
    dstate: tl.tensor,
    states: tl.tensor,
    deltas: tl.tensor,
    dq: tl.tensor,
    dk: tl.tensor,
    dv: tl.tensor,
    dg: tl.tensor,
    dbeta: tl.tensor,
    q_row: tl.tensor,
    k_row: tl.tensor,
    v_row: tl.tensor,
    tokens: tl.tensor,
    T: tl.tensor,
    H: tl.tensor,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    SEGMENT: tl.constexpr,
    TANH: tl.constexpr,
) -> None:
    """The gradients, that of the initial state in place of that of the final one. `checkpointed.py` derives them.

    Operands as in `forward_kernel`; dy, dv: [tokens, H, V]; dstate: [N, H, K, V] float32; dq, dk: [blocks, tokens, H,
    K]; dg, dbeta: [blocks, tokens, H] float32. Scratch of each program: states [SEGMENT] tiles in panels, of saved's
    dtype, and deltas [SEGMENT, BV] float32.
    """
    BLOCKS: tl.constexpr = (V + BV - 1) // BV
    FULL_K: tl.constexpr = K == BK
    FULL_V: tl.constexpr = V % BV == 0
    FULL: tl.constexpr = FULL_K and FULL_V
    pid = tl.program_id(0).to(tl.int64)
    i_v, i_nh = pid % BLOCKS, pid // BLOCKS
    i_n, i_h = i_nh // H, i_nh % H
    first, steps = _sequence(ends, i_n, T)

    o_k, o_b = tl.arange(0, BK), tl.arange(0, BV)
    o_v = i_v * BV + o_b
    in_k, in_v = o_k < K, o_v < V
    inside = in_k[:, None] & in_v[None, :]
    o_state = i_nh * (K * V) + o_k[:, None] * V + o_v[None, :]
    SIZE: tl.constexpr = BLOCKS * BV * BK
    o_saved, o_tile = _panels(o_k, o_v, BK), _panels(o_k, o_b, BK)
    saved += ((first // SEGMENT + i_n) * H + i_h) * SIZE
    states += pid * (SEGMENT * BK * BV)
    deltas += pid * (SEGMENT * BV)
    q += i_h * K
    k += i_h * K
    v += i_h * V
    dq += i_v * tokens * H * K + i_h * K
    dk += i_v * tokens * H * K + i_h * K
    dg += i_v * tokens * H
    if beta is not None:
        dbeta += i_v * tokens * H

    b_G = _load(dstate + o_state, inside, FULL)
    segments = (steps + SEGMENT - 1) // SEGMENT
    for back in range(segments):
        i_s = segments - 1 - back
        start = first + i_s * SEGMENT
        length = tl.minimum(SEGMENT, steps - i_s * SEGMENT)
        b_s = tl.load(saved + i_s.to(tl.int64) * H * SIZE + o_saved).to(tl.float32)
        # The last walk is done reading what this replay overwrites.
        tl.debug_barrier()
        for i in range(length):
            t = start + i
            b_k, b_v = _load(k + t * k_row + o_k, in_k, FULL_K), _load(v + t * v_row + o_v, in_v, FULL_V)
            gate = None
            if beta is not None:
                gate = tl.load(beta + t * H + i_h)
            tl.store(states + i * (BK * BV) + o_tile, b_s.to(states.dtype.element_ty))
            b_e, b_s = _step(b_s, b_k, b_v, tl.load(g + t * H + i_h), gate, TANH)
            tl.store(deltas + i * BV + o_b, b_e)
        tl.debug_barrier()

        b_before = tl.load(states + (length - 1) * (BK * BV) + o_tile)
        for j in range(length):
            i = length - 1 - j
            t = start + i
            th = t * H + i_h
            b_last = b_before.to(tl.float32)
            b_before = tl.load(states + tl.maximum(i - 1, 0) * (BK * BV) + o_tile)
            b_q, b_k = _load(q + t * q_row + o_k, in_k, FULL_K), _load(k + t * k_row + o_k, in_k, FULL_K)
            b_dy, b_e = _load(dy + th * V + o_v, in_v, FULL_V), tl.load(deltas + i * BV + o_b)
            decay = tl.exp(tl.load(g + th))

            b_dq = tl.sum(b_s * b_dy[None, :], 1)
            b_G += b_q[:, None] * b_dy[None, :]
            b_Z = b_G
            if TANH is not None:
                b_Z = b_G * (1.0 - b_s * b_s)
            b_dw = tl.sum(b_Z * b_k[:, None], 0)
            b_w = b_e
            b_dv = b_dw
            if beta is not None:
                gate = tl.load(beta + th)
                tl.store(dbeta + th, tl.sum(b_dw * b_e, 0))
                b_w = gate * b_e
                b_dv = gate * b_dw
            b_dk = tl.sum(b_Z * b_w[None, :] - b_last * b_dv[None, :], 1)
            tl.store(dg + th, decay * tl.sum(tl.sum(b_Z * b_last, 0), 0))
            b_G = decay * b_Z - b_k[:, None] * b_dv[None, :]
            b_s = b_last
            _store(dv + th * V + o_v, b_dv, in_v, FULL_V)
            _store(dq + t * (H * K) + o_k, b_dq, in_k, FULL_K)
            _store(dk + t * (H * K) + o_k, b_dk, in_k, FULL_K)
    _store(dstate + o_state, b_G, inside, FULL)
