"""Triton kernels of the divergence between two rows of logits: one program per row."""

from radlads.backends.torch.kernels.lang import tl, triton

LOG2_E = tl.constexpr(1.4426950408889634)
# A logit beyond the vocabulary: its exponential is 0, and the difference of two is no NaN.
NOTHING = tl.constexpr(-1e30)
# Sums of exponentials beyond this are not used: their products might overflow.
LARGE = tl.constexpr(1e25)


@triton.jit
def kl_over_mixture(log_ratio, log_beta, log_rest):
    """log q - log m, where m = beta p + (1 - beta) q, from log p - log q, without overflow or log 0."""
    x = log_ratio + log_beta
    return -(tl.maximum(x, log_rest) + tl.log(1.0 + tl.exp(-tl.abs(x - log_rest))))


@triton.jit
def kl_block(row, column, V, OTHER: tl.constexpr):
    """A block of logits as they are stored; the caller asks for the next one before it works on this one."""
    return tl.load(row + column, mask=(column >= 0) & (column < V), other=OTHER)


@triton.jit
def kl_sums(student, teacher, z_from, t_from, V, inv_temperature,
            KIND: tl.constexpr, CE: tl.constexpr, BLOCK: tl.constexpr):
    """Of one row, with logits less z_from and t_from: sums of exponentials (student, teacher, student at temperature 1) and
    of exponentials times the log-ratio.

    Powers of two of (x - from) * scale: one multiply-add and one exponential for each logit.
    """
    lane = tl.arange(0, BLOCK)
    scale = inv_temperature * LOG2_E
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
        z_exp = tl.exp2(z * scale - z_from * scale)
        z_sum += z_exp
        if CE:
            plain_sum += tl.exp2(z * LOG2_E - z_from * LOG2_E)
        if KIND != "none":
            t_exp = tl.exp2(t * scale - t_from * scale)
            t_sum += t_exp
            if KIND == "kl":
                cross += t_exp * (t - z)
            if KIND == "reverse_kl":
                cross += z_exp * (z - t)
    return tl.sum(z_sum, 0), tl.sum(t_sum, 0), tl.sum(plain_sum, 0), tl.sum(cross, 0)


@triton.jit
def kl_largest(row, V, BLOCK: tl.constexpr):
    """The largest logit of a row."""
    lane = tl.arange(0, BLOCK)
    found = tl.full((BLOCK,), NOTHING, tl.float32)
    for start in range(0, V, BLOCK):
        found = tl.maximum(found, kl_block(row, start + lane, V, NOTHING).to(tl.float32))
    return tl.max(found, 0)


@triton.jit
def kl_stats_kernel(student, teacher, labels, table, V, student_stride, teacher_stride, first_id, inv_temperature,
                    KIND: tl.constexpr, CE: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Row of the table: both log-sum-exps, the expected log-ratio of the logits, and what cross-entropy needs."""
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    table += row * COLUMNS
    lane = tl.arange(0, BLOCK)
    # Exponentials are of logits less the largest of the first block, so that no maximum has to be followed along the row.
    z_from = tl.max(kl_block(student, lane, V, NOTHING).to(tl.float32), 0)
    t_from = z_from
    if KIND != "none":
        t_from = tl.max(kl_block(teacher, lane, V, NOTHING).to(tl.float32), 0)
    z_sum, t_sum, plain_sum, cross = kl_sums(student, teacher, z_from, t_from, V, inv_temperature, KIND, CE, BLOCK)
    # Those sums are at least 1; where later logits are larger by more than fits, the row is done again from its largest.
    if not (z_sum < LARGE and t_sum < LARGE and plain_sum < LARGE):
        z_from = kl_largest(student, V, BLOCK)
        if KIND != "none":
            t_from = kl_largest(teacher, V, BLOCK)
        z_sum, t_sum, plain_sum, cross = kl_sums(student, teacher, z_from, t_from, V, inv_temperature, KIND, CE, BLOCK)
    tl.store(table, z_from * inv_temperature + tl.log(z_sum))
    if KIND != "none":
        tl.store(table + 1, t_from * inv_temperature + tl.log(t_sum))
    if KIND == "kl":
        tl.store(table + 2, cross / t_sum * inv_temperature)
    if KIND == "reverse_kl":
        tl.store(table + 2, cross / z_sum * inv_temperature)
    if CE:
        tl.store(table + 3, z_from + tl.log(plain_sum))
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
    """Overwrites the student's logits with the gradient of the weighted loss. The second axis of the grid shares out a row."""
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
    blocks = tl.cdiv(tl.cdiv(V, BLOCK), tl.num_programs(1))
    last = (tl.num_programs(1) - tl.program_id(1)) * blocks - 1
    next_z = kl_block(student, last * BLOCK + lane, V, 0.0)
    next_t = next_z
    if KIND != "top_k":
        next_t = kl_block(teacher, last * BLOCK + lane, V, 0.0)
    for step in range(0, blocks):
        column = (last - step) * BLOCK + lane
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
