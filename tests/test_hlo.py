"""Counts of compiled programs, against programs whose products, loops, exchanges and copies are known."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from grpo_jax.model.blockwise import BLOCK_SIZE, blockwise_attention, plan_blocks
from grpo_jax.model.decoder import forward
from grpo_jax.model.mask import NO_WINDOW, single_sequence
from grpo_jax.parallel.mesh import make_mesh
from grpo_jax.planning.counts import axes_of_groups, count_program, replica_groups
from grpo_jax.planning.hlo import parse_shapes
from tests.tiny import CONFIG, params

ONE = {"data": 1}
CUBE = {"data": 2, "fsdp": 2, "tensor": 2}
NO_COPIES = 2**62


def count(function, *args, trips=None, inside="", mesh_axes=ONE, min_copy_bytes=NO_COPIES):
    """Compiles a function for CPU devices and counts its work."""
    text = jax.jit(function).lower(*args).compile().as_text()
    return count_program(text, mesh_axes, trips or {}, min_copy_bytes, inside)


def program(body, *computations):
    """Returns the text of a program of these instructions."""
    return "\n\n".join(
        ["HloModule jit_f, is_scheduled=true", *computations, f"ENTRY %main (p: f32[]) -> f32[] {{\n{body}\n}}\n"]
    )


def read(body, *computations, mesh_axes=ONE, min_copy_bytes=NO_COPIES, **options):
    return count_program(program(body, *computations), mesh_axes, options.pop("trips", {}), min_copy_bytes, **options)


def ones(*shape, dtype=jnp.float32):
    return jnp.ones(shape, dtype)


def test_a_product_takes_two_flops_per_multiplication():
    assert count(jnp.matmul, ones(48, 32), ones(32, 64)).product_flops == 2 * 48 * 32 * 64
    batched = count(partial(jnp.einsum, "nlhe,nche->nhlc"), ones(3, 40, 4, 16), ones(3, 24, 4, 16))
    assert batched.product_flops == 2 * 3 * 4 * 40 * 24 * 16


@pytest.mark.parametrize(
    "options",
    [{}, {"window_strides": (2, 3)}, {"lhs_dilation": (3, 1), "rhs_dilation": (1, 2)}, {"feature_group_count": 3}],
)
def test_a_convolution_takes_no_flops_for_padding(options):
    options = {"window_strides": (1, 1), "padding": ((2, 1), (0, 3))} | options

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, **options)

    x, kernel = ones(2, 3, 9, 8), ones(6, 3 // options.get("feature_group_count", 1), 4, 2)
    # Each multiplication of ones adds 1 to the result.
    assert count(convolve, x, kernel).product_flops == 2 * float(convolve(x, kernel).sum())


def test_the_body_of_a_scan_counts_once_per_trip():
    def scan(x, kernels):
        return jax.lax.scan(lambda x, kernel: (jnp.sin(x @ kernel), None), x, kernels)[0]

    counts = count(scan, ones(16, 32), ones(7, 32, 32))
    assert (counts.product_flops, counts.unknown) == (7 * 2 * 16 * 32 * 32, ())


def nested_loops(x, outer, inner):
    """Multiplies by a matrix in loops of unknown length, in the scopes "tokens" and "refill"."""

    def multiply(state):
        i, x = state
        return i + 1, jnp.sin(x @ x)

    def body(state):
        i, x = state
        with jax.named_scope("refill"):
            x = jax.lax.while_loop(lambda s: s[0] < inner, multiply, (0, x))[1]
        return i + 1, jnp.cos(x @ x)

    with jax.named_scope("tokens"):
        return jax.lax.while_loop(lambda s: s[0] < outer, body, (0, x))[1]


def test_the_caller_states_the_trips_of_loops_by_their_scope():
    product, args = 2 * 32**3, (ones(32, 32), 5, 2)
    stated = count(nested_loops, *args, trips={"tokens": 5, "refill": 2})
    assert (stated.product_flops, stated.unknown) == (5 * (1 + 2) * product, ())
    assert stated.host_reads == (5 + 1) + 5 * (2 + 1)
    assert count(nested_loops, *args, trips={"tokens": 5, "refill": 0}).product_flops == 5 * product
    partly = count(nested_loops, *args, trips={"tokens": 5})
    assert partly.product_flops == 5 * 2 * product and len(partly.unknown) == 1 and "refill" in partly.unknown[0]


def test_every_branch_of_a_conditional_counts():
    def choose(x, wanted):
        return jax.lax.cond(wanted, lambda x: x @ jnp.sin(x @ x), lambda x: jnp.cos(x) @ x, x)

    counts = count(choose, ones(32, 32), True)
    assert (counts.product_flops, counts.host_reads) == (3 * 2 * 32**3, 1)


def test_one_trip_of_a_loop_can_be_counted():
    product, args = 2 * 32**3, (ones(32, 32), 5, 2)
    token = count(nested_loops, *args, trips={"tokens": 5, "refill": 0.25}, inside="tokens")
    assert token.product_flops == 1.25 * product
    assert token.host_reads == 1 + 1.25
    with pytest.raises(ValueError, match="no loop in the scope 'layers'"):
        count(nested_loops, *args, inside="layers")


def test_gradients_of_the_decoder_take_six_flops_per_weight_and_token():
    weights, tokens = params(), jnp.ones((3, 8), jnp.int32)
    # The embedding table is not multiplied, and the scores of attention are counted apart.
    kernels = jax.tree_util.tree_leaves_with_path(weights)
    size = sum(x.size for path, x in kernels if "kernel" in str(path))
    products = 2 * tokens.size * size
    attention = 2 * 2 * 3 * 8 * 8 * CONFIG.num_heads * CONFIG.head_dim * len(CONFIG.layers)
    run = partial(forward, CONFIG, tokens=tokens)
    counts = count(run, weights)
    assert (counts.product_flops, counts.attention_flops) == (products, attention)
    counts = count(jax.grad(lambda weights: jnp.sum(jnp.sin(run(weights)))), weights)
    assert (counts.product_flops, counts.attention_flops) == (3 * products, 3 * attention)


def test_blockwise_attention_visits_the_blocks_on_and_below_the_diagonal():
    length, heads, width = 4 * BLOCK_SIZE, 2, 16
    inputs = ones(1, length, heads, width), ones(1, heads, width, length), ones(1, heads, length, width)
    segments = single_sequence(jnp.arange(length)[None], jnp.ones((1, length), bool))
    plan = plan_blocks(segments, segments, NO_WINDOW)

    @jax.named_scope("attention")
    def attend(q, keys, values):
        return blockwise_attention(q, keys, values, segments, segments, NO_WINDOW, plan, divisor=4.0)

    product = 2 * (1 + 2 + 3 + 4) * BLOCK_SIZE**2 * heads * width
    counts = count(attend, *inputs, trips={"key_blocks": 2.5})
    assert (counts.product_flops, counts.attention_flops, counts.unknown) == (0, 2 * product, ())
    gradients = jax.grad(lambda *inputs: jnp.sum(attend(*inputs) ** 2), argnums=(0, 1, 2))
    counts = count(gradients, *inputs, trips={"key_blocks": 2.5})
    assert (counts.product_flops, counts.attention_flops, counts.unknown) == (0, (2 + 5) * product, ())


def test_rows_are_written_in_place():
    def write(buffer, rows):
        def body(i, buffer):
            return jax.lax.dynamic_update_slice(buffer, rows * 2 + i, (i, 0))

        return jax.lax.fori_loop(0, 100, body, buffer)

    counts = count(jax.jit(write, donate_argnums=0), ones(1000, 256), ones(1, 256))
    assert 100 * 2 * 1024 <= counts.bytes < 3e6  # and not 100 times the megabyte of the buffer


def test_collectives_are_counted_by_kind_size_and_axis():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)

    @partial(jax.shard_map, mesh=mesh, in_specs=P("data"), out_specs=P(("data", "fsdp", "tensor")), check_vma=False)
    def exchange(x):
        def body(x, _):
            return jnp.sin(jax.lax.psum(x, "tensor")), None

        x, _ = jax.lax.scan(body, x, length=3)
        x = jax.lax.all_gather(x, "fsdp", tiled=True)
        x = jax.lax.psum_scatter(jnp.sin(x), ("data", "tensor"), tiled=True)
        x = jax.lax.all_to_all(jnp.sin(x), "data", 0, 0, tiled=True)
        return jax.lax.ppermute(jnp.sin(x), "tensor", [(0, 1), (1, 0)])

    part = 32 * 16 * 4  # bytes of x on a device
    items = {
        (item.kind, item.axes, item.devices, item.bytes, item.count): item.sent_bytes
        for item in count(exchange, ones(64, 16), mesh_axes=dict(mesh.shape)).collectives
    }
    expected = {
        ("all-reduce", ("tensor",), 2, part, 3): part,
        ("all-gather", ("fsdp",), 2, 2 * part, 1): part,
        ("reduce-scatter", ("data", "tensor"), 4, 2 * part, 1): 1.5 * part,
        ("all-to-all", ("data",), 2, part / 2, 1): part / 4,
        ("collective-permute", ("tensor",), 2, part / 2, 1): part / 2,
    }
    assert items == expected


def test_collectives_of_a_sharded_product_run_over_the_contracted_axis():
    mesh = make_mesh(fsdp=4, tensor=2)
    x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=jax.NamedSharding(mesh, P("fsdp", "tensor")))
    kernel = jax.ShapeDtypeStruct((32, 16), jnp.float32, sharding=jax.NamedSharding(mesh, P("tensor", None)))
    counts = count(jnp.matmul, x, kernel, mesh_axes=dict(mesh.shape))
    (item,) = counts.collectives
    assert (item.kind, item.axes, item.bytes) == ("all-reduce", ("tensor",), 16 * 16 * 4)
    assert counts.product_flops == 2 * 64 * 32 * 16 / 8


@pytest.mark.parametrize(
    ("text", "groups", "axes"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", [(0, 1), (2, 3), (4, 5), (6, 7)], ("tensor",)),
        ("replica_groups={}, dimensions={0}", [tuple(range(8))], ("data", "fsdp", "tensor")),
        ("replica_groups=[4,2]<=[8]", [(0, 1), (2, 3), (4, 5), (6, 7)], ("tensor",)),
        ("replica_groups=[4,2]<=[4,2]", [(0, 1), (2, 3), (4, 5), (6, 7)], ("tensor",)),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", [(0, 2, 4, 6), (1, 3, 5, 7)], ("data", "fsdp")),
        ("replica_groups=[4,2]<=[2,2,2]T(0,2,1)", [(0, 2), (1, 3), (4, 6), (5, 7)], ("fsdp",)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}, x={'b'}", [(0, 4), (1, 5), (2, 6), (3, 7)], ("data",)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", [(0, 2), (1, 3), (4, 6), (5, 7)], ("fsdp",)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b':(2)2}", [(0, 1, 4, 5), (2, 3, 6, 7)], ("data", "tensor")),
        ("replica_groups=mesh['a'=8], device_ids=([4,2]T(1,0)) {'a':(1)4}", [(0, 4, 1, 5), (2, 6, 3, 7)], None),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(0,2,1,3) {'b'}", [(0, 2), (1, 3)], ("fsdp",)),
        ("source_target_pairs={{0,4},{4,0}}", [(0, 4), (4, 0)], ("data",)),
    ],
)
def test_groups_of_devices_are_read_in_every_notation(text, groups, axes):
    assert sorted(replica_groups(text, CUBE)) == sorted(groups)
    assert axes is None or axes_of_groups(groups, CUBE) == axes


@pytest.mark.parametrize(
    ("text", "size", "on_chip"),
    [
        ("f32[3,5]{1,0}", 60, False),
        ("bf16[32,9,64]{2,1,0:T(8,128)(2,1)}", 32 * 16 * 128 * 2, False),
        ("bf16[32,9,64]{1,0,2:T(8,128)(2,1)S(1)}", 64 * 32 * 128 * 2, True),
        ("s32[]{:T(128)}", 4, False),
        ("pred[10]{0}", 10, False),
        ("f8e4m3fn[10]", 10, False),
        ("s4[10]{0}", 5, False),
        ("token[]", 0, False),
    ],
)
def test_arrays_take_whole_tiles(text, size, on_chip):
    (shape,) = parse_shapes(text)
    assert (shape.bytes, shape.on_chip) == (size, on_chip)


def test_products_of_tpus_are_convolutions():
    heads = """\
  %x = bf16[4096,2,384,1]{2,0,3,1:T(8,128)(2,1)} parameter(0)
  %k = bf16[12,128,2,384]{3,1,2,0:T(8,128)(2,1)} parameter(1)
  ROOT %c = bf16[4096,12,128,1]{2,0,3,1:T(8,128)(2,1)} convolution(%x, %k), window={size=12x2 pad=11_11x0_0 \
rhs_reversal=1x0}, dim_labels=b1f0_0o1i->b0f1, metadata={op_name="jit(f)/DecoderLayer/attention/q/dot_general"}"""
    assert read(heads).product_flops == 2 * 4096 * 12 * 128 * 2 * 384
    batched = """\
  %q = bf16[32,2,6,128]{3,2,1,0:T(8,128)(2,1)} parameter(0)
  %k = bf16[32,2,128,1536]{2,3,1,0:T(8,128)(2,1)} parameter(1)
  ROOT %c = f32[32,2,6,1536]{3,2,1,0:T(8,128)S(1)} convolution(%q, %k), window={size=32x2 stride=31x1 \
lhs_dilate=32x2}, dim_labels=01bf_01io->01bf, metadata={op_name="jit(f)/while/body/attention/dot_general"}"""
    counts = read(batched)
    assert (counts.product_flops, counts.attention_flops) == (0, 2 * 32 * 2 * 6 * 128 * 1536)


SPLASH = """\
  %m = s8[1,8,8]{{2,1,0}} parameter(0)
  %q = bf16[12,4096,128]{{2,1,0}} parameter(1)
  %k = bf16[2,4096,128]{{2,1,0}} parameter(2)
  %v = bf16[2,4096,64]{{2,1,0}} parameter(3)
  ROOT %s = bf16[12,4096,64]{{2,1,0}} custom-call(%m, %m, %m, %q, %k, /*index=5*/%v), \
custom_call_target="tpu_custom_call", frontend_attributes={{kernel_metadata={{
"xprof_metadata":"{{\\"block_q\\": 512}}"
}}}}, metadata={{op_name="jit(f)/attention/{kernel}/pallas_call"}}"""


@pytest.mark.parametrize(
    ("kernel", "widths"),
    [
        ("splash_mha_fwd_residuals", 128 + 64),
        ("splash_mha_dq_no_residuals", 2 * 128 + 64),
        ("splash_mha_dkv_no_residuals", 2 * 128 + 2 * 64),
    ],
)
def test_splash_attention_computes_the_tiles_on_and_below_the_diagonal(kernel, widths):
    counts = read(SPLASH.format(kernel=kernel))
    assert (counts.product_flops, counts.attention_flops) == (0, 2 * 12 * 36 * 512 * 512 * widths)


def test_a_kernel_counts_what_it_states_and_is_named_if_it_states_nothing():
    text = SPLASH.format(kernel="my_kernel")
    counts = read(text)
    assert (counts.product_flops, counts.unknown) == (0, ("jit(f)/attention/my_kernel/pallas_call",))
    text += ', backend_config={"custom_call_config":{"cost_estimate":{"flops":"8","bytes_accessed":"24"}}}'
    counts = read(text)
    assert (counts.product_flops, counts.bytes, counts.unknown) == (8, 24, ())


CUDNN = """\
  %q = bf16[2,512,12,128]{{3,2,1,0}} parameter(0)
  %k = bf16[2,1024,2,128]{{3,2,1,0}} parameter(1)
  ROOT %a = (bf16[2,12,512,128]{{3,1,2,0}}, u8[0]{{0}}) custom-call(%q, %k, %k), \
custom_call_target="__cudnn$fmha{kind}", backend_config={{"cudnn_fmha_backend_config": {{"mask_type": "{mask}"}}}}"""


@pytest.mark.parametrize(
    ("kind", "mask", "products"),
    [("Softmax", "NO_MASK", 2), ("Softmax", "CAUSAL", 1), ("ScaleBiasSoftmaxBackward", "NO_MASK", 5)],
)
def test_cudnn_attention_skips_only_what_it_masks_itself(kind, mask, products):
    assert read(CUDNN.format(kind=kind, mask=mask)).attention_flops == products * 2 * 2 * 12 * 512 * 1024 * 128


def test_a_kernel_of_a_gpu_reads_the_cache_and_writes_a_token_into_it():
    """The queries, the new key and the new value of a token are one operand."""
    counts = read("""\
  %t = bf16[32,15,64]{2,1,0} parameter(0)
  %p = s32[32]{0} parameter(1)
  %k = bf16[32,3,64,1536]{3,2,1,0} parameter(2)
  %v = bf16[32,3,1536,64]{3,2,1,0} parameter(3)
  ROOT %a = (bf16[32,9,64]{2,1,0}, bf16[32,3,64,1536]{3,2,1,0}, bf16[32,3,1536,64]{3,2,1,0}) \
custom-call(%t, %p, %p, %k, %v), custom_call_target="__gpu$xla.gpu.triton", \
output_to_operand_aliasing={{1}: (3, {}), {2}: (4, {})}, api_version=API_VERSION_TYPED_FFI, \
metadata={op_name="jit(f)/attention/token_attention/pallas_call"}""")
    assert (counts.attention_flops, counts.product_flops, counts.unknown) == (2 * 2 * 32 * 9 * 64 * 1536, 0, ())
    assert counts.bytes == 2 * (32 * 15 * 64 + 2 * 32 * 3 * 64 * 1536 + 32 * 9 * 64) + 4 * 32


def test_calls_of_cublas_are_products():
    counts = read("""\
  %x = bf16[64,256]{1,0} parameter(0)
  %k = bf16[256,512]{1,0} parameter(1)
  ROOT %g = (bf16[64,512]{1,0}, s8[4194304]{0}) custom-call(%x, %k), custom_call_target="__cublas$lt$matmul", \
backend_config={"gemm_backend_config":{"alpha_real":1,"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],\
"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]}}}""")
    assert counts.product_flops == 2 * 64 * 256 * 512
    assert counts.kernels == 1


def test_an_all_reduce_fused_with_a_slice_is_a_reduce_scatter():
    fused = """\
%all-reduce-scatter.2 (input: f32[1536,128]) -> f32[384,128] {
  %input = f32[1536,128]{1,0:T(8,128)S(1)} parameter(0)
  %all-reduce.1 = f32[1536,128]{1,0:T(8,128)} all-reduce(%input), replica_groups={{0,1,2,3}}, to_apply=%add
  %zero = u32[] constant(0)
  ROOT %slice = f32[384,128]{1,0:T(8,128)} dynamic-slice(%all-reduce.1, %zero, %zero), dynamic_slice_sizes={384,128}
}"""
    body = """\
  %gradient = f32[1536,128]{1,0:T(8,128)S(1)} parameter(0)
  ROOT %f = f32[384,128]{1,0:T(8,128)} fusion(%gradient), kind=kCustom, calls=%all-reduce-scatter.2, \
metadata={op_name="jit(update)/q"}"""
    (item,) = read(body, fused, mesh_axes={"data": 1, "fsdp": 4}).collectives
    assert (item.kind, item.axes, item.bytes, item.op_name) == ("reduce-scatter", ("fsdp",), 786432, "jit(update)/q")
    whole = fused.replace("ROOT %slice = f32[384,128]", "ROOT %slice = f32[1536,128]")
    (item,) = read(body.replace("%f = f32[384", "%f = f32[1536"), whole, mesh_axes={"data": 1, "fsdp": 4}).collectives
    assert item.kind == "all-reduce"


DECODE = """\
%relayout (a: bf16[128,1536], b: bf16[128,1536]) -> (bf16[128,1536], bf16[1536,128]) {
  %a = bf16[128,1536]{1,0:T(8,128)} parameter(0)
  %b = bf16[128,1536]{1,0:T(8,128)} parameter(1)
  %copied = bf16[128,1536]{0,1:T(8,128)} copy(%a)
  %turned = bf16[1536,128]{1,0:T(8,128)} transpose(%b), dimensions={1,0}
  ROOT %both = (bf16[128,1536]{0,1:T(8,128)}, bf16[1536,128]{1,0:T(8,128)}) tuple(%copied, %turned)
}

%write (a: bf16[128,1536], row: bf16[1,1536], i: s32[]) -> bf16[128,1536] {
  %a = bf16[128,1536]{1,0:T(8,128)} parameter(0)
  %row = bf16[1,1536]{1,0:T(1,128)} parameter(1)
  %i = s32[] parameter(2)
  ROOT %written = bf16[128,1536]{1,0:T(8,128)} dynamic-update-slice(%a, %row, %i, %i)
}

%body (state: (bf16[128,1536], bf16[128,1536], s32[])) -> (bf16[128,1536], bf16[128,1536], s32[]) {
  %state = (bf16[128,1536]{1,0:T(8,128)}, bf16[128,1536]{1,0:T(8,128)}, s32[]) parameter(0)
  %keys = bf16[128,1536]{1,0:T(8,128)} get-tuple-element(%state), index=0
  %values = bf16[128,1536]{1,0:T(8,128)} get-tuple-element(%state), index=1
  %i = s32[] get-tuple-element(%state), index=2
  %step = s32[] constant(1)
  %later = s32[] add(%i, %step)
  %row = bf16[1,1536]{1,0:T(1,128)} iota(), iota_dimension=1
  %written = bf16[128,1536]{1,0:T(8,128)} fusion(%keys, %row, %i), kind=kLoop, calls=%write
  COPIES
  ROOT %next = (bf16[128,1536]{1,0:T(8,128)}, bf16[128,1536]{1,0:T(8,128)}, s32[]) tuple(%written, %values, %later)
}

%condition (state: (bf16[128,1536], bf16[128,1536], s32[])) -> pred[] {
  %state = (bf16[128,1536]{1,0:T(8,128)}, bf16[128,1536]{1,0:T(8,128)}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%state), index=2
  %seven = s32[] constant(7)
  ROOT %more = pred[] compare(%i, %seven), direction=LT
}"""
LOOP = """\
  %keys = bf16[128,1536]{1,0:T(8,128)} parameter(0)
  %i = s32[] constant(4)
  %copied = bf16[128,1536]{0,1:T(8,128)} copy(%keys)
  %start = (bf16[128,1536]{1,0:T(8,128)}, bf16[128,1536]{1,0:T(8,128)}, s32[]) tuple(%keys, %keys, %i)
  ROOT %end = (bf16[128,1536]{1,0:T(8,128)}, bf16[128,1536]{1,0:T(8,128)}, s32[]) while(%start), \
condition=%condition, body=%body, metadata={op_name="jit(decode)/tokens/while"}"""
CACHE = 128 * 1536 * 2


@pytest.mark.parametrize(
    ("copies", "expected"),
    [
        ("%none = s32[] add(%i, %i)", 0),
        ("%c = bf16[128,1536]{0,1:T(8,128)} copy(%values)", 1),
        ("%c = bf16[128,1536]{0,1:T(8,128)S(1)} copy(%values)", 1),  # another layout, even if it stays on the chip
        ("%c = bf16[1536,128]{1,0:T(8,128)} transpose(%values), dimensions={1,0}", 1),
        ("%c = (bf16[128,1536]{1,0}, bf16[1536,128]{1,0}) fusion(%keys, %values), kind=kLoop, calls=%relayout", 2),
        ("%c = (bf16[128,1536]{1,0}, bf16[128,1536]{1,0:S(1)}, u32[]) copy-start(%values)", 1),
        ("%c = (bf16[128,1536]{1,0:S(1)}, bf16[128,1536]{1,0}, u32[]) copy-start(%values)", 0),  # a read ahead of time
    ],
)
def test_copies_of_the_cache_in_the_decode_loop_are_listed(copies, expected):
    text = program(LOOP, DECODE.replace("COPIES", copies))
    listed = count_program(text, ONE, {}, CACHE, inside="tokens").copies
    assert sum(item.count for item in listed) == expected
    assert all(item.bytes == CACHE for item in listed)
    whole = count_program(text, ONE, {}, CACHE)
    assert sum(item.count for item in whole.copies) == 1 + (7 - 4) * expected
    assert count_program(text, ONE, {}, CACHE + 1).copies == ()


@pytest.mark.parametrize(("step", "trips"), [(1, 3), (2, 2), (3, 1)])
def test_loops_may_count_in_larger_steps(step, trips):
    text = program(LOOP, DECODE.replace("COPIES", "").replace("constant(1)", f"constant({step})"))
    counts = count_program(text, ONE, {}, CACHE)
    assert (counts.host_reads, counts.unknown) == (trips + 1, ())
    assert counts.kernels == 1 + 3 * trips + (trips + 1)  # the first copy, the body, the comparison
    unknown = count_program(text.replace("add(%i, %step)", "multiply(%i, %step)"), ONE, {}, CACHE)
    assert unknown.unknown == ("jit(decode)/tokens/while",)


@pytest.mark.parametrize("write", ["dynamic-update-slice(%a, %row, %i, %i)", "scatter(%a, %i, %row), to_apply=%last"])
def test_bytes_and_kernels_of_a_token(write):
    text = program(LOOP, DECODE.replace("COPIES", "").replace("dynamic-update-slice(%a, %row, %i, %i)", write))
    counts = count_program(text, ONE, {}, CACHE, inside="tokens")
    # A row is made, read and written into the cache. The index is increased, read by the write and compared.
    assert counts.kernels == 4
    assert counts.bytes == 3 * 1536 * 2 + 3 * 4 + 4 + (4 + 4 + 1)


def test_a_loop_that_never_runs_holds_nothing_unknown():
    kernel = '%c = bf16[128,1536]{1,0} custom-call(%values), custom_call_target="tpu_custom_call"'
    text = program(LOOP, DECODE.replace("COPIES", kernel).replace("add(%i, %step)", "multiply(%i, %step)"))
    assert len(count_program(text, ONE, {"tokens": 1}, CACHE).unknown) == 1
    never = count_program(text, ONE, {"tokens": 0}, CACHE)
    assert (never.unknown, never.kernels) == ((), 2)  # the copy before the loop and the comparison


STEP = """\
%step.{name} (part: bf16[224,64], whole: bf16[896,64]) -> (bf16[224,64], bf16[896,64]) {{
  %part = bf16[224,64]{{1,0}} parameter(0)
  %whole = bf16[896,64]{{1,0}} parameter(1)
  %gathered = bf16[896,64]{{1,0}} all-gather(%part), replica_groups={{{{0,1,2,3}}}}, dimensions={{0}}, \
backend_config={{"async_collective_fusion_config":{{"flag_start":"{start}","flag_end":"{start}"}}}}
  ROOT %both = (bf16[224,64]{{1,0}}, bf16[896,64]{{1,0}}) tuple(%part, %gathered)
}}"""


def test_a_collective_that_is_fused_into_several_products_counts_once():
    fusion = "fusion(%part, %whole), kind=kCustom, calls=%step"
    body = f"""\
  %part = bf16[224,64]{{1,0}} parameter(0)
  %whole = bf16[896,64]{{1,0}} parameter(1)
  %begin = (bf16[224,64]{{1,0}}, bf16[896,64]{{1,0}}) {fusion}.begin
  %go.on = (bf16[224,64]{{1,0}}, bf16[896,64]{{1,0}}) {fusion}.later
  ROOT %end = (bf16[224,64]{{1,0}}, bf16[896,64]{{1,0}}) {fusion}.later"""
    steps = STEP.format(name="begin", start=-1), STEP.format(name="later", start=2)
    counts = read(body, *steps, mesh_axes={"data": 1, "fsdp": 4})
    (item,) = counts.collectives
    assert (item.kind, item.bytes, item.count) == ("all-gather", 896 * 64 * 2, 1)
    assert counts.bytes == (224 + 896) * 64 * 2


def test_text_without_a_program_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        count_program("HloModule empty", ONE, {}, 0)


@pytest.mark.parametrize(
    "source, target, moved", [("", "S(1)", 16), ("", "", 32), ("S(1)", "", 16), ("S(1)", "S(1)", 0)]
)
def test_a_slice_moves_its_own_bytes_to_or_from_the_devices_memory(source, target, moved):
    whole, part = f"f32[8]{{0:T(8){source}}}", f"f32[4]{{0:T(4){target}}}"
    body = f"""  %p = {whole} parameter(0)
  %s = (({whole}), {part}, s32[]) slice-start(%p), slice={{[0:4]}}
  ROOT %d = {part} slice-done(%s)"""
    assert read(body).bytes == moved
