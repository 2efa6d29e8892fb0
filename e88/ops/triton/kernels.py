"""The recurrence and its gradients as two Triton kernels.

Letters as in `e88.ops.contract`. A program owns BV columns of one head of one sequence and keeps its tile of the
state, [BK, BV] with K padded to BK, in registers: given k, q and the decay, columns know nothing of one another.

The forward kernel saves the state every SEGMENT steps. The backward kernel takes the segments from the last to the
first: it replays one from its saved state, writing every state and delta to scratch memory of its own, small enough
to stay in cache, then walks back through it. Its dq, dk, dg and dbeta are sums over its own columns; with more than
one block of columns the caller adds them up.

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
def _scalars(g: tl.tensor, beta: tl.tensor, th: tl.tensor) -> tl.tensor:
    """The decay and the gate of step and head `th`."""
    decay = tl.exp(tl.load(g + th))
    if beta is None:
        gate = 1.0
    else:
        gate = tl.load(beta + th)
    return decay, gate


@triton.jit
def _step(
    b_s: tl.tensor, b_k: tl.tensor, b_v: tl.tensor, decay: tl.tensor, gate: tl.tensor, TANH: tl.constexpr
) -> tl.tensor:
    """The delta [BV] and the next state [BK, BV]."""
    b_e = b_v - tl.sum(b_s * b_k[:, None], 0)
    b_s = decay * b_s + b_k[:, None] * (gate * b_e)[None, :]
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

    o_k, o_v = tl.arange(0, BK), tl.arange(0, BV)
    in_k, in_v = o_k < K, i_v * BV + o_v < V
    inside = in_k[:, None] & in_v[None, :]
    state += i_nh * (K * V) + i_v * BV
    o_state = o_k[:, None] * V + o_v[None, :]
    SIZE: tl.constexpr = BLOCKS * BV * BK
    if saved is not None:
        saved += ((first // SEGMENT + i_n) * H + i_h) * SIZE + i_v * (BV * BK)
    q += first * q_row + i_h * K + o_k
    k += first * k_row + i_h * K + o_k
    v += first * v_row + i_h * V + i_v * BV + o_v
    y += (first * H + i_h) * V + i_v * BV + o_v
    g += first * H + i_h
    if beta is not None:
        beta += first * H + i_h

    b_s = _load(state + o_state, inside, FULL)
    if steps > 0:
        b_q, b_k, b_v = _load(q, in_k, FULL_K), _load(k, in_k, FULL_K), _load(v, in_v, FULL_V)
        decay, gate = _scalars(g, beta, 0)
        for done in range(0, steps, SEGMENT):
            if saved is not None:
                b_saved = b_s
                if saved.dtype.element_ty == tl.float16:
                    # A given state, unlike those after a tanh, may be out of range.
                    b_saved = tl.clamp(b_s, -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL)
                tl.store(saved + _panels(o_k, o_v, BK), b_saved.to(saved.dtype.element_ty))
                saved += H * SIZE
            # From here on steps are counted within the segment, in 32 bits.
            left = steps - done
            for i in range(tl.minimum(SEGMENT, left)):
                # The next step's inputs are on their way while this one is computed.
                n = tl.minimum(i + 1, left - 1)
                next_q, next_k = _load(q + n * q_row, in_k, FULL_K), _load(k + n * k_row, in_k, FULL_K)
                next_v = _load(v + n * v_row, in_v, FULL_V)
                next_decay, next_gate = _scalars(g, beta, n * H)
                b_e, b_s = _step(b_s, b_k, b_v, decay, gate, TANH)
                _store(y + i * H * V, tl.sum(b_s * b_q[:, None], 0), in_v, FULL_V)
                b_q, b_k, b_v, decay, gate = next_q, next_k, next_v, next_decay, next_gate
            q += SEGMENT * q_row
            k += SEGMENT * k_row
            v += SEGMENT * v_row
            y += SEGMENT * H * V
            g += SEGMENT * H
            if beta is not None:
                beta += SEGMENT * H
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

    o_k, o_v = tl.arange(0, BK), tl.arange(0, BV)
    in_k, in_v = o_k < K, i_v * BV + o_v < V
    inside = in_k[:, None] & in_v[None, :]
    dstate += i_nh * (K * V) + i_v * BV
    o_state = o_k[:, None] * V + o_v[None, :]
    SIZE: tl.constexpr = BLOCKS * BV * BK
    saved += ((first // SEGMENT + i_n) * H + i_h) * SIZE + i_v * (BV * BK)
    o_saved = _panels(o_k, o_v, BK)
    states += pid * (SEGMENT * BK * BV)
    deltas += pid * (SEGMENT * BV)
    q += i_h * K
    k += i_h * K
    v += i_h * V + i_v * BV
    dy += i_h * V + i_v * BV
    dv += i_h * V + i_v * BV
    dq += (i_v * tokens * H + i_h) * K
    dk += (i_v * tokens * H + i_h) * K
    g += i_h
    dg += i_v * tokens * H + i_h
    if beta is not None:
        beta += i_h
        dbeta += i_v * tokens * H + i_h

    b_G = _load(dstate + o_state, inside, FULL)
    segments = (steps + SEGMENT - 1) // SEGMENT
    for back in range(segments):
        i_s = segments - 1 - back
        start = first + i_s * SEGMENT
        length = tl.minimum(SEGMENT, steps - i_s * SEGMENT)
        b_s = tl.load(saved + i_s.to(tl.int64) * H * SIZE + o_saved).to(tl.float32)
        # From here on steps are counted within the segment, in 32 bits.
        q_s, k_s, v_s = q + start * q_row, k + start * k_row, v + start * v_row
        th = start * H
        g_s, dg_s, dy_s, dv_s = g + th, dg + th, dy + th * V, dv + th * V
        dq_s, dk_s = dq + th * K, dk + th * K
        beta_s, dbeta_s = beta, dbeta
        if beta is not None:
            beta_s, dbeta_s = beta + th, dbeta + th

        # The last walk is done reading what this replay overwrites.
        tl.debug_barrier()
        # In both loops the next step's inputs are on their way while one step is computed.
        b_k, b_v = _load(k_s + o_k, in_k, FULL_K), _load(v_s + o_v, in_v, FULL_V)
        decay, gate = _scalars(g_s, beta_s, 0)
        for i in range(length):
            n = tl.minimum(i + 1, length - 1)
            next_k, next_v = _load(k_s + n * k_row + o_k, in_k, FULL_K), _load(v_s + n * v_row + o_v, in_v, FULL_V)
            next_decay, next_gate = _scalars(g_s, beta_s, n * H)
            tl.store(states + i * (BK * BV) + o_saved, b_s.to(states.dtype.element_ty))
            b_e, b_s = _step(b_s, b_k, b_v, decay, gate, TANH)
            tl.store(deltas + i * BV + o_v, b_e)
            b_k, b_v, decay, gate = next_k, next_v, next_decay, next_gate
        tl.debug_barrier()

        n = length - 1
        b_q, b_k = _load(q_s + n * q_row + o_k, in_k, FULL_K), _load(k_s + n * k_row + o_k, in_k, FULL_K)
        b_dy, b_e = _load(dy_s + n * H * V + o_v, in_v, FULL_V), tl.load(deltas + n * BV + o_v)
        decay, gate = _scalars(g_s, beta_s, n * H)
        b_half = tl.load(states + n * (BK * BV) + o_saved)
        for j in range(length):
            i = length - 1 - j
            n = tl.maximum(i - 1, 0)
            next_q, next_k = _load(q_s + n * q_row + o_k, in_k, FULL_K), _load(k_s + n * k_row + o_k, in_k, FULL_K)
            next_dy, next_e = _load(dy_s + n * H * V + o_v, in_v, FULL_V), tl.load(deltas + n * BV + o_v)
            next_decay, next_gate = _scalars(g_s, beta_s, n * H)
            b_before = b_half.to(tl.float32)
            b_half = tl.load(states + n * (BK * BV) + o_saved)

            b_G += b_q[:, None] * b_dy[None, :]
            b_dq = tl.sum(b_s * b_dy[None, :], 1)
            b_Z = b_G
            if TANH is not None:
                b_Z = b_G * (1.0 - b_s * b_s)
            b_dw = tl.sum(b_Z * b_k[:, None], 0)
            b_dv = gate * b_dw
            b_dk = tl.sum(b_Z * (gate * b_e)[None, :] - b_before * b_dv[None, :], 1)
            tl.store(dg_s + i * H, decay * tl.sum(tl.reshape(b_Z * b_before, [BK * BV], can_reorder=True), 0))
            if beta is not None:
                tl.store(dbeta_s + i * H, tl.sum(b_dw * b_e, 0))
            b_G = decay * b_Z - b_k[:, None] * b_dv[None, :]
            _store(dv_s + i * H * V + o_v, b_dv, in_v, FULL_V)
            _store(dq_s + i * H * K + o_k, b_dq, in_k, FULL_K)
            _store(dk_s + i * H * K + o_k, b_dk, in_k, FULL_K)
            b_s, b_q, b_k, b_dy, b_e = b_before, next_q, next_k, next_dy, next_e
            decay, gate = next_decay, next_gate
    _store(dstate + o_state, b_G, inside, FULL)
