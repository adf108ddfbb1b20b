"""Triton kernels of the divergence between two rows of logits: one program per row."""

from radlads.backends.torch.kernels.lang import tl, triton

LOG2_E = tl.constexpr(1.4426950408889634)
# A logit beyond the vocabulary: its exponential is 0, and the difference of two is no NaN.
NOTHING = tl.constexpr(-1e30)


@triton.jit
def kl_over_mixture(log_ratio, log_beta, log_rest):
    """log q - log m, where m = beta p + (1 - beta) q, from log p - log q, without overflow or log 0."""
    x = log_ratio + log_beta
    return -(tl.maximum(x, log_rest) + tl.log(1.0 + tl.exp(-tl.abs(x - log_rest))))


@triton.jit
def kl_larger(x, y, x_other, y_other):
    return tl.maximum(x, x_other), tl.maximum(y, y_other)


@triton.jit
def kl_block(row, column, V, OTHER: tl.constexpr):
    """A block of logits as they are stored; the caller asks for the next one before it works on this one."""
    return tl.load(row + column, mask=(column >= 0) & (column < V), other=OTHER)


@triton.jit
def kl_stats_kernel(student, teacher, labels, table, V, student_stride, teacher_stride, first_id, inv_temperature,
                    KIND: tl.constexpr, CE: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Row of the table: both log-sum-exps, the expected log-ratio of the logits, and what cross-entropy needs."""
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    table += row * COLUMNS
    lane = tl.arange(0, BLOCK)
    # Powers of two of (x - max) * scale: one multiply-add and one exponential for each logit.
    scale = inv_temperature * LOG2_E
    z_max = tl.full((), NOTHING, tl.float32)
    t_max = tl.full((), NOTHING, tl.float32)
    z_sum = tl.zeros((BLOCK,), tl.float32)
    t_sum = tl.zeros((BLOCK,), tl.float32)
    plain_sum = tl.zeros((BLOCK,), tl.float32)
    cross = tl.zeros((BLOCK,), tl.float32)
    next_z = kl_block(student, lane, V, NOTHING)
    next_t = next_z
    if KIND != "none":
        next_t = kl_block(teacher, lane, V, NOTHING)
    for start in range(0, V, BLOCK):
        z = next_z.to(tl.float32)
        t = next_t.to(tl.float32)
        next_z = kl_block(student, start + BLOCK + lane, V, NOTHING)
        if KIND != "none":
            next_t = kl_block(teacher, start + BLOCK + lane, V, NOTHING)
            z_new, t_new = tl.reduce((z, t), 0, kl_larger)
        else:
            z_new = tl.max(z, 0)
            t_new = t_max
        z_new = tl.maximum(z_max, z_new)
        z_scale = tl.exp2((z_max - z_new) * scale)
        z_exp = tl.exp2(z * scale - z_new * scale)
        z_sum = z_sum * z_scale + z_exp
        if CE:
            plain_sum = plain_sum * tl.exp2((z_max - z_new) * LOG2_E) + tl.exp2(z * LOG2_E - z_new * LOG2_E)
        z_max = z_new
        if KIND != "none":
            t_new = tl.maximum(t_max, t_new)
            t_scale = tl.exp2((t_max - t_new) * scale)
            t_exp = tl.exp2(t * scale - t_new * scale)
            t_sum = t_sum * t_scale + t_exp
            t_max = t_new
            if KIND == "kl":
                cross = cross * t_scale + t_exp * (t - z)
            if KIND == "reverse_kl":
                cross = cross * z_scale + z_exp * (z - t)
    z_total = tl.sum(z_sum, 0)
    tl.store(table, z_max * inv_temperature + tl.log(z_total))
    if KIND != "none":
        t_total = tl.sum(t_sum, 0)
        tl.store(table + 1, t_max * inv_temperature + tl.log(t_total))
        if KIND == "kl":
            tl.store(table + 2, tl.sum(cross, 0) / t_total * inv_temperature)
        if KIND == "reverse_kl":
            tl.store(table + 2, tl.sum(cross, 0) / z_total * inv_temperature)
    if CE:
        tl.store(table + 3, z_max + tl.log(tl.sum(plain_sum, 0)))
        label = tl.load(labels + row) - first_id
        tl.store(table + 4, tl.load(student + label, mask=(label >= 0) & (label < V), other=0.0).to(tl.float32))


@triton.jit
def kl_mixture_kernel(student, teacher, table, V, student_stride, teacher_stride, inv_temperature, log_beta, log_rest,
                      COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """KL of teacher and student to their mixture, into columns 2 and 5, given both log-sum-exps."""
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    table += row * COLUMNS
    lane = tl.arange(0, BLOCK)
    z_log_sum = tl.load(table)
    t_log_sum = tl.load(table + 1)
    from_teacher = tl.zeros((BLOCK,), tl.float32)
    from_student = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        inside = start + lane < V
        log_q = tl.load(student + start + lane, mask=inside, other=0.0).to(tl.float32) * inv_temperature - z_log_sum
        log_p = tl.load(teacher + start + lane, mask=inside, other=0.0).to(tl.float32) * inv_temperature - t_log_sum
        over = kl_over_mixture(log_p - log_q, log_beta, log_rest)
        from_teacher += tl.where(inside, tl.exp(log_p) * (log_p - log_q + over), 0.0)
        from_student += tl.where(inside, tl.exp(log_q) * over, 0.0)
    tl.store(table + 2, tl.sum(from_teacher, 0))
    tl.store(table + 5, tl.sum(from_student, 0))


@triton.jit
def kl_grad_kernel(student, teacher, labels, weights, table, V, student_stride, teacher_stride, first_id, inv_temperature,
                   kl_weight, ce_weight, beta, log_beta, log_rest,
                   KIND: tl.constexpr, CE: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Overwrites the student's logits with the gradient of the weighted loss."""
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    table += row * COLUMNS
    lane = tl.arange(0, BLOCK)
    weight = tl.load(weights + row)
    z_log_sum = tl.load(table)
    kl_scale = weight * kl_weight * inv_temperature
    scale = inv_temperature * LOG2_E
    if KIND != "top_k":
        t_log_sum = tl.load(table + 1)
    if KIND == "reverse_kl":
        slope = tl.load(table + 2) - z_log_sum + t_log_sum
    if KIND == "jsd":
        slope = (1.0 - beta) * tl.load(table + 5)
    if KIND == "top_k":
        slope = tl.load(table + 5)
    if CE:
        plain_log_sum = tl.load(table + 3)
        label = tl.load(labels + row) - first_id
    # From the end: the last blocks of the pass before may still be in the cache.
    blocks = tl.cdiv(V, BLOCK)
    next_z = kl_block(student, (blocks - 1) * BLOCK + lane, V, 0.0)
    next_t = next_z
    if KIND != "top_k":
        next_t = kl_block(teacher, (blocks - 1) * BLOCK + lane, V, 0.0)
    for step in range(0, blocks):
        column = (blocks - 1 - step) * BLOCK + lane
        z = next_z.to(tl.float32)
        t = next_t.to(tl.float32)
        next_z = kl_block(student, column - BLOCK, V, 0.0)
        log_q = z * inv_temperature - z_log_sum
        q = tl.exp2(z * scale - z_log_sum * LOG2_E)
        grad = tl.zeros((BLOCK,), tl.float32)
        if KIND != "top_k":
            next_t = kl_block(teacher, column - BLOCK, V, 0.0)
            log_p = t * inv_temperature - t_log_sum
            if KIND == "kl":
                grad = q - tl.exp2(t * scale - t_log_sum * LOG2_E)
            if KIND == "reverse_kl":
                grad = q * (log_q - log_p - slope)
            if KIND == "jsd":
                grad = q * ((1.0 - beta) * kl_over_mixture(log_p - log_q, log_beta, log_rest) - slope)
        if KIND == "top_k":
            grad = q * slope
        grad *= kl_scale
        if CE:
            grad += weight * ce_weight * (tl.exp(z - plain_log_sum) - tl.where(column == label, 1.0, 0.0))
        # A token that does not count has no gradient, whatever its logits are.
        grad = tl.where(weight == 0.0, 0.0, grad)
        tl.store(student + column, grad.to(student.dtype.element_ty), mask=column < V)


@triton.jit
def scale_kernel(x, factor, count, BLOCK: tl.constexpr):
    """x *= factor in place; a factor of 1 moves nothing."""
    by = tl.load(factor).to(tl.float32)
    if by != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x + at, mask=at < count).to(tl.float32) * by
        tl.store(x + at, value.to(x.dtype.element_ty), mask=at < count)
