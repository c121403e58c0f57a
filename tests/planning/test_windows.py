"""What a product's windows fetch: grids that can be walked by hand."""

import pytest

from mer_r1_jax.planning.work import work_of

PRODUCT = """HloModule jit_h

%product (p0: f32[512,256], p1: bf16[256,1024]) -> bf16[512,1024] {{
  %p0 = f32[512,256]{{1,0:T(8,128)}} parameter(0)
  %p1 = bf16[256,1024]{{1,0:T(8,128)(2,1)}} parameter(1)
  %x = bf16[512,256]{{1,0:T(8,128)(2,1)}} convert(%p0)
  ROOT %y = bf16[512,1024]{{1,0:T(8,128)(2,1)}} convolution(%x, %p1), dim_labels=bf_io->bf
}}

ENTRY %main (a: f32[512,256], b: bf16[256,1024]) -> bf16[512,1024] {{
  %a = f32[512,256]{{1,0:T(8,128)}} parameter(0)
  %b = bf16[256,1024]{{1,0:T(8,128)(2,1)}} parameter(1)
  ROOT %z = bf16[512,1024]{{1,0:T(8,128)(2,1)}} fusion(%a, %b), kind=kOutput, calls=%product, backend_config={windows}
}}
"""
LEFT, RIGHT, RESULT = 4 * 512 * 256, 2 * 256 * 1024, 2 * 512 * 1024  # bytes


def windows(left, right, result, grid, cycles=700):
    """The compiler's window configuration; windows in tiles of 8 x 128 values."""
    named = {"input_window": left, "kernel_window": right, "output_window": result, "iteration": grid}
    lists = ",".join(f'"{name}_bounds":[{",".join(quoted(values))}]' for name, values in named.items())
    return f'{{"window_config":{{"estimated_cycles":"{cycles}",{lists}}}}}'


def quoted(values):
    return [f'"{value}"' for value in values]


@pytest.mark.parametrize(
    ("config", "bytes_"),
    [
        # Four windows of the left operand, two of the right; one of them stays while those of the other pass.
        (windows((16, 2), (32, 4), (16, 4), (2, 4, 1)), min(2 * LEFT + RIGHT, LEFT + 4 * RIGHT)),
        # All of the right one at once.
        (windows((16, 2), (32, 8), (16, 8), (1, 4, 1)), LEFT + RIGHT),
        # The summed dimension in two steps: both change at every step.
        (windows((16, 1), (16, 4), (16, 4), (2, 4, 2)), 2 * LEFT + 4 * RIGHT),
    ],
)
def test_windows_are_read_again_as_often_as_they_have_to_be(config, bytes_):
    (product,) = work_of(PRODUCT.format(windows=config)).products
    assert (product.flops, product.cycles, product.calls) == (2 * 512 * 256 * 1024, 700, 1)
    assert product.bytes == max(bytes_, LEFT + RIGHT + RESULT)
    assert product.seconds(1e12, 1e9) == max(product.flops / 1e12, product.bytes / 1e9)


def test_an_operand_on_the_chip_is_not_read_again():
    config = windows((16, 1), (16, 4), (16, 4), (2, 4, 2))
    held = PRODUCT.format(windows=config).replace(
        "%b = bf16[256,1024]{1,0:T(8,128)(2,1)}", "%b = bf16[256,1024]{1,0:S(1)}"
    )
    (product,) = work_of(held).products
    assert product.bytes == max(2 * LEFT, LEFT + RESULT)


def test_a_product_without_windows_moves_its_arrays():
    (product,) = work_of(PRODUCT.format(windows="{}")).products
    assert (product.bytes, product.cycles) == (LEFT + RIGHT + RESULT, 0)


@pytest.mark.parametrize(
    "config",
    [
        windows((16, 2), (2,), (16,), (4, 1)),
        windows((16, 2), (2, 1), (16, 1), (4, 1)),  # as if the vector had columns
        windows((), (2,), (16,), (4, 1)),
    ],
)
def test_a_product_with_a_vector_states_no_windows(config):
    """Its plan goes on: what it takes is that its arrays are moved once."""
    vector = PRODUCT.replace("[256,1024]{{1,0:T(8,128)(2,1)}}", "[256]{{0:T(256)(128)(2,1)}}")
    vector = vector.replace("[256,1024]", "[256]").replace("[512,1024]{{1,0:T(8,128)(2,1)}}", "[512]{{0:T(512)}}")
    vector = vector.replace("[512,1024]", "[512]").replace("convolution", "dot")
    vector = vector.replace("dim_labels=bf_io->bf", "lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}")
    (product,) = work_of(vector.format(windows=config)).products
    assert (product.flops, product.bytes) == (2 * 512 * 256, LEFT + 2 * 256 + 2 * 512)


def test_a_product_whose_windows_have_other_dimensions_moves_its_arrays():
    for config in (windows((16,), (32, 4), (16, 4), (2, 4, 1)), windows((), (32, 4), (16, 4), (2, 4, 1))):
        (product,) = work_of(PRODUCT.format(windows=config)).products
        assert product.bytes == LEFT + RIGHT + RESULT
