"""Reading programs: sizes and counts that can be checked by hand, on text as the TPU compiler writes it."""

import re

import pytest

from mer_r1_jax.planning.hlo import parse
from mer_r1_jax.planning.work import work_of

LOOP = """HloModule jit_f, is_scheduled=true

%fused.slice (p0: bf16[8,64,128], p1: s32[]) -> bf16[64,128] {
  %p0 = bf16[8,64,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p1 = s32[]{:T(128)S(6)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %cut = bf16[1,64,128]{2,1,0:T(8,128)(2,1)} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,64,128}
  ROOT %flat = bf16[64,128]{1,0:T(8,128)(2,1)} bitcast(%cut)
}

%body (arg: (s32[], bf16[8,64,128], bf16[32,64])) -> (s32[], bf16[8,64,128], bf16[32,64]) {
  %arg = (s32[]{:T(128)}, bf16[8,64,128]{2,1,0:T(8,128)(2,1)}, /*index=2*/bf16[32,64]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %w = bf16[8,64,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%arg), index=1
  %x = bf16[32,64]{1,0:T(8,128)(2,1)} get-tuple-element(%arg), index=2
  %layer = bf16[64,128]{1,0:T(8,128)(2,1)} fusion(%w, %i), kind=kLoop, calls=%fused.slice
  %y = f32[32,128]{1,0:T(8,128)S(1)} convolution(%x, %layer), dim_labels=bf_io->bf, config={"estimated_cycles":"50"}
  %sum = f32[32,128]{1,0:T(8,128)S(1)} all-reduce(%y), replica_groups=[4,2]<=[8], to_apply=%add
  ROOT %out = (s32[]{:T(128)}, bf16[8,64,128]{2,1,0:T(8,128)(2,1)}, bf16[32,64]{1,0:T(8,128)(2,1)}) tuple(%i, %w, %x)
}

%condition (arg.1: (s32[], bf16[8,64,128], bf16[32,64])) -> pred[] {
  %limit = s32[]{:T(128)} constant(8)
  %arg.1 = (s32[]{:T(128)}, bf16[8,64,128]{2,1,0:T(8,128)(2,1)}, bf16[32,64]{1,0:T(8,128)(2,1)}) parameter(0)
  %at = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%at, %limit), direction=LT
}

ENTRY %main (a: s32[], b: bf16[8,64,128], c: bf16[32,64]) -> (s32[], bf16[8,64,128], bf16[32,64]) {
  %a = s32[]{:T(128)} parameter(0)
  %b = bf16[8,64,128]{2,1,0:T(8,128)(2,1)} parameter(1)
  %c = bf16[32,64]{1,0:T(8,128)(2,1)} parameter(2)
  %start = (s32[]{:T(128)}, bf16[8,64,128]{2,1,0:T(8,128)(2,1)}, bf16[32,64]{1,0:T(8,128)(2,1)}) tuple(%a, %b, %c)
  ROOT %loop = (s32[], bf16[8,64,128]{2,1,0:T(8,128)(2,1)}, bf16[32,64]) while(%start), condition=%condition, body=%body
}
"""
TRIPS, LAYER, X = 8, 2 * 64 * 128, 2 * 32 * 64


def test_everything_in_a_loop_counts_by_its_trips():
    work = work_of(LOOP)
    assert work.flops == TRIPS * 2 * 32 * 64 * 128
    assert work.cycles == TRIPS * 50
    # The slice is read and written; the product reads both; its result stays on the chip.
    index = 4
    assert work.hbm_bytes == TRIPS * (2 * LAYER + index + LAYER + X)
    (collective,) = work.collectives
    assert (collective.kind, collective.bytes, collective.chips, collective.calls) == ("all-reduce", 4 * 32 * 128, 2, 8)
    assert collective.sent == 8 * 2 * 4 * 32 * 128 / 2


def test_a_loop_that_data_ends_takes_the_trips_it_is_given():
    ended = LOOP.replace("ROOT %lt = pred[]{:T(512)} compare(", "%lt = pred[]{:T(512)} compare(").replace(
        "direction=LT\n", "direction=LT\n  ROOT %and = pred[]{:T(512)} and(%lt, %lt)\n"
    )
    work = work_of(ended, longest_loop=1024)
    assert (work.flops, work.open_loops) == (1024 * 2 * 32 * 64 * 128, 1)
    assert work_of(LOOP, longest_loop=1024).open_loops == 0


def test_a_stated_trip_count_goes_before_the_condition():
    stated = LOOP.replace("body=%body\n", 'body=%body, backend_config={"known_trip_count":{"n":"3"}}\n')
    assert work_of(stated).flops == 3 * 2 * 32 * 64 * 128


ENTRY = """HloModule jit_g

%all-reduce-scatter.1 (p: f32[64,128]) -> f32[16,128] {{
  %p = f32[64,128]{{1,0:T(8,128)}} parameter(0)
  %all = f32[64,128]{{1,0:T(8,128)}} all-reduce(%p), replica_groups={{{{0,1,2,3}}}}, to_apply=%add
  ROOT %mine = f32[16,128]{{1,0:T(8,128)}} dynamic-slice(%all, %all), dynamic_slice_sizes={{16,128}}
}}

%updated (p.1: f32[64,128], p.2: f32[1,128]) -> f32[64,128] {{
  %p.1 = f32[64,128]{{1,0:T(8,128)}} parameter(0)
  %p.2 = f32[1,128]{{1,0:T(8,128)}} parameter(1)
  %zero = s32[]{{:T(128)}} constant(0)
  ROOT %put = f32[64,128]{{1,0:T(8,128)}} dynamic-update-slice(%p.1, %p.2, %zero, %zero)
}}

ENTRY %main (a: f32[64,128], b: f32[1,128]) -> f32[64,128] {{
  %a = f32[64,128]{{1,0:T(8,128)}} parameter(0)
  %b = f32[1,128]{{1,0:T(8,128)}} parameter(1)
  ROOT {line}
}}
"""


@pytest.mark.parametrize(
    ("line", "kind", "size"),
    [
        (
            "%s = f32[16,128]{1,0:T(8,128)} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1",
            "reduce-scatter",
            32768,
        ),
        ("%s = f32[16,128]{1,0:T(8,128)} reduce-scatter(%a), replica_groups={{0,1,2,3}}", "reduce-scatter", 32768),
        ("%s = f32[256,128]{1,0:T(8,128)} all-gather(%a), replica_groups={{0,1,2,3}}", "all-gather", 4 * 32768),
        (
            "%s = (f32[64,128]{1,0}, f32[256,128]{1,0}) all-gather-start(%a), replica_groups=[1,4]<=[4]",
            "all-gather",
            4 * 32768,
        ),
        (
            "%s = f32[256,128]{1,0:T(8,128)} all-gather(%a), replica_groups=mesh['x'=2,'y'=4] {'y'}, dimensions={0}",
            "all-gather",
            4 * 32768,
        ),
        (
            "%s = f32[256,128]{1,0:T(8,128)} all-gather(%a), replica_groups=mesh['x'=2,'y'=8] {'x','y':(4)2}",
            "all-gather",
            4 * 32768,
        ),
    ],
)
def test_collectives_are_known_by_every_spelling(line, kind, size):
    (collective,) = work_of(ENTRY.format(line=line)).collectives
    assert (collective.kind, collective.bytes, collective.chips) == (kind, size, 4)
    assert collective.sent == size * 3 / 4


def test_a_collective_fused_with_products_counts_once():
    """The fusions that start it, carry it on and end it all hold it, under one channel."""
    part = """%part{number} (w{number}: f32[64,128]) -> f32[256,128] {{
  %w{number} = f32[64,128]{{1,0:T(8,128)}} parameter(0)
  ROOT %g{number} = f32[256,128] all-gather(%w{number}), channel_id={channel}, replica_groups={{{{0,1,2,3}}}}
}}

"""
    parts = "".join(part.format(number=number, channel=channel) for number, channel in ((1, 7), (2, 7), (3, 8)))
    lines = [f"%f{number} = f32[256,128] fusion(%a), kind=kCustom, calls=%part{number}" for number in (1, 2, 3)]
    text = ENTRY.format(line="LINES").replace("ROOT LINES", "\n  ".join(lines)).replace("ENTRY", parts + "ENTRY")
    (collective,) = work_of(text).collectives
    assert (collective.kind, collective.calls) == ("all-gather", 2)
    # Nothing carries the other one on.
    assert (collective.synchronous, work_of(text).collective_operations, work_of(text).synchronous_operations) == (
        1,
        2,
        1,
    )


WRAPPED = """%wrapped (p.3: f32[64,128]) -> f32[256,128] {
  %p.3 = f32[64,128]{1,0:T(8,128)} parameter(0)
  ROOT %g = f32[256,128]{1,0:T(8,128)} all-gather(%p.3), channel_id=1, replica_groups={{0,1,2,3}}
}, execution_thread="sparsecore"

"""


@pytest.mark.parametrize(
    ("line", "synchronous"),
    [
        ("%s = f32[256,128]{1,0:T(8,128)} all-gather(%a), channel_id=1, replica_groups={{0,1,2,3}}", 1),
        ("%s = f32[16,128]{1,0:T(8,128)} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1", 1),
        ("%s = (f32[64,128]{1,0}, f32[256,128]{1,0}) all-gather-start(%a), replica_groups={{0,1,2,3}}", 0),
        ("%s = ((f32[64,128]{1,0}), f32[256,128]{1,0}, u32[]) async-start(%a), calls=%wrapped", 0),
    ],
)
def test_only_what_ends_before_the_next_operation_is_synchronous(line, synchronous):
    work = work_of(ENTRY.format(line=line).replace("ENTRY", WRAPPED + "ENTRY"))
    (collective,) = work.collectives
    assert (collective.calls, collective.synchronous) == (1, synchronous)
    assert (work.collective_operations, work.synchronous_operations) == (1, synchronous)
    assert work.exposed == synchronous * work.sent


def test_collectives_of_a_schedule_are_each_one_of_its_own():
    """Parts of one larger collective may share a channel."""
    line = "f32[64,128] collective-permute({}), channel_id=1, source_target_pairs={{{{0,1}}}}"
    text = ENTRY.format(line=f"%t = {line.format('%s')}").replace("  ROOT", f"  %s = {line.format('%a')}\n  ROOT")
    (collective,) = work_of(text).collectives
    assert (collective.calls, collective.synchronous) == (2, 2)


def test_a_collective_of_unknown_size_is_refused():
    with pytest.raises(ValueError, match="%?s: cannot tell which chips"):
        work_of(ENTRY.format(line="%s = f32[256,128] all-gather(%a), replica_groups=new_spelling"))


def test_computations_of_other_cores_end_where_they_end():
    """Gathers run on the sparse cores; their computations close with the name of the thread."""
    text = LOOP.replace("bitcast(%cut)\n}", 'bitcast(%cut)\n}, execution_thread="sparsecore"')
    assert text != LOOP
    assert work_of(text) == work_of(LOOP)


def test_an_update_in_place_writes_the_update_alone():
    line = "%s = f32[64,128]{1,0:T(8,128)} fusion(%a, %b), kind=kLoop, calls=%updated"
    assert work_of(ENTRY.format(line=line)).hbm_bytes == 2 * 4 * 128


def test_kernels_that_state_nothing_are_counted():
    silent = '%s = f32[64,128] custom-call(%a), custom_call_target="tpu_custom_call"'
    for estimate in ('{"flops": 99, "transcendentals": 1}', '{"bytes_accessed":"7","flops":"99"}'):
        work = work_of(ENTRY.format(line=f'{silent}, backend_config={{"cost_estimate": {estimate}}}'))
        assert (work.flops, work.kernel_flops, work.silent_kernels) == (99, 99, 0)
    assert (work_of(ENTRY.format(line=silent)).flops, work_of(ENTRY.format(line=silent)).silent_kernels) == (0, 1)


def test_a_kernel_moves_what_it_states():
    """It may be handed a whole stacked cache and read one layer of it."""
    line = '%s = f32[64,128] custom-call(%a), custom_call_target="tpu_custom_call", backend_config={"cost_estimate": '
    assert work_of(ENTRY.format(line=line + '{"bytes_accessed":"77","flops":"99"}}')).hbm_bytes == 77
    assert work_of(ENTRY.format(line=line + '{"flops":"99"}}')).hbm_bytes == 2 * 4 * 64 * 128


def test_an_argument_read_through_another_shape_is_read_whole():
    """Weights reach a product through a fusion that holds nothing but a bitcast."""
    reshaped = """%shape (q: f32[64,128]) -> f32[128,64] {
  %q = f32[64,128]{1,0:T(8,128)} parameter(0)
  ROOT %other = f32[128,64]{1,0:T(8,128)} bitcast(%q)
}

%product (w: f32[64,128]) -> f32[] {
  %w = f32[64,128]{1,0:T(8,128)} parameter(0)
  %view = f32[128,64]{1,0:T(8,128)} fusion(%w), kind=kLoop, calls=%shape
  ROOT %sum = f32[]{:T(128)} reduce(%view), dimensions={0,1}, to_apply=%add
}

"""
    text = ENTRY.format(line="%s = f32[]{:T(128)} fusion(%a), kind=kOutput, calls=%product")
    text = text.replace("ENTRY", reshaped + "ENTRY")
    assert work_of(text).hbm_bytes == 4 * 64 * 128 + 4


def test_attention_of_packed_rows_counts_the_tiles_it_visits():
    estimate = 'custom_call_target="tpu_custom_call", backend_config={"cost_estimate": {"flops": 100}}'
    names = {
        "text_decoder/while/attention_backward": 25,
        "vision_tower/attention_forward": 100,
        "logprobs_forward": 100,
    }
    for name, flops in names.items():
        line = f'%s = f32[64,128] custom-call(%a), metadata={{op_name="jit(f)/{name}/pallas_call"}}, {estimate}'
        assert work_of(ENTRY.format(line=line), visited=0.25).kernel_flops == flops


def test_holes_of_a_batched_product_are_no_work():
    """The TPU compiler writes a batch as a window over the batch that meets one real input at a time."""
    window = "window={size=8 pad=0_0 stride=7 lhs_dilate=8}, dim_labels=0bf_0oi->0bf"
    lines = (
        "%x = f32[8,32,64]{2,1,0} copy(%a)",
        "%y = f32[8,16,64]{2,1,0} copy(%a)",
        f"ROOT %z = f32[8,32,16] convolution(%x, %y), {window}",
    )
    text = ENTRY.format(line="LINES").replace("ROOT LINES", "\n  ".join(lines))
    assert work_of(text).flops == 2 * 8 * 32 * 16 * 64


def test_padding_of_a_convolution_is_no_work():
    lines = (
        "%x = f32[4,10,64]{2,1,0} copy(%a)",
        "%k = f32[3,64,16]{2,1,0} copy(%a)",
        "ROOT %z = f32[4,10,16] convolution(%x, %k), window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f",
    )
    text = ENTRY.format(line="LINES").replace("ROOT LINES", "\n  ".join(lines))
    assert work_of(text).flops == 2 * 4 * 64 * 16 * (3 * 10 - 2)


GPU = """HloModule jit_h, is_scheduled=true

%layer_of_stack (p0: bf16[36,64,128], p1: s32[]) -> bf16[1,64,128] {
  %p0 = bf16[36,64,128]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %cut = bf16[1,64,128]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,64,128}
}

ENTRY %main (a: bf16[36,64,128], i: s32[], x: bf16[8,32,64], y: bf16[8,64,128]) -> bf16[] {
  %a = bf16[36,64,128]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %x = bf16[8,32,64]{2,1,0} parameter(2)
  %y = bf16[8,64,128]{2,1,0} parameter(3)
"""
A, X_GPU, Y = 2 * 36 * 64 * 128, 2 * 8 * 32 * 64, 2 * 8 * 64 * 128


def gpu_work(line):
    return work_of(f"{GPU}  {line}\n}}\n")


def test_a_product_of_a_gpu_s_library_counts_without_its_scratch_memory():
    work = gpu_work(
        '%z = (bf16[8,32,128]{2,1,0}, s8[4194304]{0}) custom-call(%x, %y), custom_call_target="__cublas$lt$matmul", '
        'backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"],'
        '"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]}}}'
    )
    assert (work.flops, work.kernel_flops, work.silent_kernels) == (2 * 8 * 32 * 64 * 128, 0, 0)
    assert work.hbm_bytes == X_GPU + Y + 2 * 8 * 32 * 128


def test_a_convolution_of_cudnn_counts_like_any_other():
    plain = "%z = bf16[8,32,128]{2,1,0} convolution(%x, %w), window={size=1}, dim_labels=b0f_0io->b0f"
    ours = GPU + "  %w = bf16[1,64,128]{2,1,0} constant({...})\n"
    call = plain.replace("bf16[8,32,128]{2,1,0} convolution", "(bf16[8,32,128]{2,1,0}, u8[0]{0}) custom-call")
    call += ', custom_call_target="__cudnn$convForward"'
    found = [work_of(f"{ours}  {line}\n}}\n") for line in (plain, call)]
    assert found[0].flops == found[1].flops == 2 * 8 * 32 * 64 * 128
    assert found[0].hbm_bytes == found[1].hbm_bytes


def test_attention_of_cudnn_counts_by_its_shapes():
    """Two products forward, five backward, of every query with every key."""
    B, T, H, K, S, h = 2, 32, 4, 2, 48, 64
    query, key = f"bf16[{B},{T},{H},{h}]{{3,2,1,0}}", f"bf16[{B},{S},{K},{h}]{{3,2,1,0}}"
    given = f"{GPU}  %q = {query} constant({{...}})\n  %k = {key} constant({{...}})\n"

    def work(target):
        call = f'  %z = ({query}, u8[0]{{0}}) custom-call(%q, %k, %k), custom_call_target="__cudnn${target}"'
        return work_of(f"{given}{call}\n}}\n")

    for target, products in (("fmhaSoftmax", 2), ("fmhaScaleBiasSoftmax", 2), ("fmhaScaleBiasSoftmaxBackward", 5)):
        found = work(target)
        assert (found.flops, found.silent_kernels) == (products * 2 * B * H * T * S * h, 0)
    unknown = work("normForward")
    assert (unknown.flops, unknown.silent_kernels) == (0, 1)


def test_a_layer_sliced_beside_other_work_moves_the_layer():
    """A fusion that runs asynchronously names its operands in its type."""
    work = gpu_work(
        "%s = ((bf16[36,64,128]{2,1,0}, s32[]), bf16[1,64,128]{2,1,0}, u32[]) fusion-start(%a, %i), kind=kLoop, "
        "calls=%layer_of_stack"
    )
    layer, index = 2 * 64 * 128, 4
    assert work.hbm_bytes == 2 * layer + index


def test_several_arrays_gathered_together_are_all_moved():
    """GPUs combine collectives; an all-reduce names its results alone."""
    gathered = "((bf16[8,32,64]{2,1,0}, bf16[8,64,128]{2,1,0}), (bf16[32,32,64]{2,1,0}, bf16[32,64,128]{2,1,0}))"
    groups = "channel_id=1, replica_groups=mesh['axis_0'=4] {'axis_0'}"
    work = gpu_work(f"%s = {gathered} all-gather-start(%x, %y), {groups}, dimensions={{0}}")
    (collective,) = work.collectives
    assert (collective.kind, collective.bytes, collective.chips) == ("all-gather", 4 * (X_GPU + Y), 4)
    assert work.hbm_bytes == 5 * (X_GPU + Y)
    reduced = gpu_work(f"%s = bf16[8,32,64]{{2,1,0}} all-reduce-start(%x), {groups}, to_apply=%add")
    assert reduced.hbm_bytes == 2 * X_GPU


def test_a_kernel_is_no_product():
    assert work_of(LOOP).products[0].calls == TRIPS
    kernel = 'custom_call_target="tpu_custom_call", backend_config={"cost_estimate":{"flops":"9"}}'
    work = work_of(ENTRY.format(line=f"%s = f32[16,128] custom-call(%a), {kernel}"))
    assert (work.products, work.kernel_flops) == ((), 9)


def test_a_kernel_beside_a_large_product_is_none_either_whatever_share_of_its_tiles_is_visited():
    """Of a difference of sums of 1e14 a rounding is left, and with it the kernel's bytes."""
    large = "%s = f32[65536,65536]{1,0:T(8,128)} dot(%x, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    given = "".join(
        f"  %{name} = f32[65536,65536]{{{{1,0:T(8,128)}}}} parameter({place})\n"
        for place, name in enumerate(("x", "y"), 2)
    )
    kernel = (
        '%k = f32[16,128]{1,0:T(8,128)} custom-call(%a), custom_call_target="tpu_custom_call", '
        'metadata={op_name="jit(f)/text_decoder/attention_forward/pallas_call"}, '
        'backend_config={"cost_estimate":{"flops":"123456789011"}}'
    )
    text = ENTRY.replace("  ROOT {line}\n", f"{given}  {{line}}\n  ROOT {{kernel}}\n")
    work = work_of(text.format(line=large, kernel=kernel), visited=0.6113)
    assert [product.flops for product in work.products] == [2.0 * 65536**3]
    assert work.kernel_flops == pytest.approx(0.6113 * 123456789011)
    assert work.flops == work.products[0].flops + work.kernel_flops


def test_parts_of_tuples_may_be_named_where_they_are_taken():
    """Since jax 0.11 `%state#1` stands where an instruction took that part, and is no more than that part."""
    taken = re.findall(r"^  (%[\w.-]+) = .* get-tuple-element\((%[\w.-]+)\), index=(\d+).*\n", LOOP, re.MULTILINE)
    text = re.sub(r"^  %[\w.-]+ = .* get-tuple-element\(.*\n", "", LOOP, flags=re.MULTILINE)
    for name, whole, place in taken:
        text = re.sub(rf"{re.escape(name)}(?![\w.#-])", f"{whole}#{place}", text)
    assert len(taken) == 4 and "get-tuple-element" not in text and "%arg#1" in text
    assert work_of(text) == work_of(LOOP)


def test_a_part_of_a_part_has_its_own_type():
    tuples = "(f32[2]{0:T(128)}, /*index=1*/(s32[], bf16[8,64,128]{2,1,0:T(8,128)(2,1)S(1)}))"
    computations, entry = parse(f"""ENTRY %main (p: {tuples}) -> bf16[8,64,128] {{
  %p = {tuples} parameter(0)
  ROOT %out = bf16[8,64,128]{{2,1,0:T(8,128)(2,1)}} copy(%p#1#1)
}}
""")
    instructions = computations[entry]
    assert instructions["out"].operands == ("p#1#1",)
    (array,) = instructions["p#1#1"].arrays
    assert (array.sizes, array.in_hbm, instructions["p#1#1"].opcode) == ((8, 64, 128), False, "get-tuple-element")
