"""Convolutions that are as fast on a CPU as its matrix products; XLA's own are many times slower there."""

from functools import partial

import jax
import jax.numpy as jnp


def space_to_depth(x: jax.Array, size: int) -> jax.Array:
    """Every block of size x size pixels as one pixel, with zeros where it reaches over the edge: [b, height, width, c]
    -> [b, ceil(height / size), ceil(width / size), size * size * c]."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), (0, -x.shape[2] % size), (0, 0)))
    b, height, width, c = x.shape
    x = x.reshape(b, height // size, size, width // size, size, c).swapaxes(2, 3)
    return x.reshape(b, height // size, width // size, -1)


@partial(jax.checkpoint, static_argnums=2)  # gradients cut the windows again: to keep them takes longer
def convolve_on_cpu(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """`convolve` by matrix products: windows, cut along the width, times all rows of the kernel at once, then added up
    along the height."""
    n = (x.shape[1] - len(kernel)) // stride + 1  # height and width of the result
    if x.shape[-1] < 16:  # windows of few channels are slow to cut; of blocks, the same convolution has a stride of 1
        kernel = jnp.moveaxis(space_to_depth(jnp.moveaxis(kernel, -1, 0), stride), 0, -1)
        x, stride = space_to_depth(x, stride), 1
    windows = [x[:, :, i : i + stride * n : stride] for i in range(len(kernel))]
    windows = jnp.concatenate(windows, axis=-1)  # [b, height, n, size * in]
    multiply = partial(jnp.einsum, "bhwk,rkc->bhwrc", preferred_element_type=jnp.float32)
    y = 0
    for i in range(stride):  # with a stride of 2, even rows of the kernel meet even rows of the image only
        rows = kernel[i::stride]
        products = multiply(windows[:, i::stride], rows.reshape(len(rows), -1, rows.shape[-1]))
        y += sum(products[:, r : r + n, :, r] for r in range(len(rows)))
    return y


def convolve(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Convolution without padding: square images [b, side, side, in], kernel [size, size, in, out]. XLA lays it out as
    each accelerator likes it (bfloat16 inputs give bfloat16 there); its convolutions on a CPU are slow."""
    if jax.default_backend() == "cpu":
        return convolve_on_cpu(x, kernel, stride)
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), "VALID", dimension_numbers=layout)
