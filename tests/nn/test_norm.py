import pytest
import torch

from lmkern.nn import LayerNorm, RMSNorm


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"elementwise_affine": False}, {"eps": 0.1}])
@pytest.mark.parametrize("shape", [7, (3, 5)])
def test_matches_torch_forward_and_backward(options, shape):
    torch.manual_seed(0)
    theirs = torch.nn.LayerNorm(shape, dtype=torch.float64, **options)
    ours = LayerNorm(shape, dtype=torch.float64, **options)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(4, 2, *theirs.normalized_shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(x)
    y, expected = ours(x), theirs(x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad((y * weight).sum(), [x, *ours.parameters()])
    expected_gradients = torch.autograd.grad((expected * weight).sum(), [x, *theirs.parameters()])
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-11, atol=1e-11)


def test_starts_as_torchs():
    for ours, theirs in zip(LayerNorm(5).parameters(), torch.nn.LayerNorm(5).parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_float32_parameters_beside_a_bfloat16_input():
    x = torch.randn(3, 8).bfloat16()
    y = LayerNorm(8)(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), torch.nn.LayerNorm(8)(x.float()), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("options", [{}, {"elementwise_affine": False}, {"eps": 0.1}])
@pytest.mark.parametrize("shape", [7, (3, 5)])
def test_rms_norm_matches_torch_forward_and_backward(options, shape):
    theirs = torch.nn.RMSNorm(shape, dtype=torch.float64, **options)
    ours = RMSNorm(shape, dtype=torch.float64, **options)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(4, 2, *theirs.normalized_shape, dtype=torch.float64, requires_grad=True)
    dy = torch.randn_like(x)
    y, expected = ours(x), theirs(x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(y, [x, *ours.parameters()], dy)
    expected_gradients = torch.autograd.grad(expected, [x, *theirs.parameters()], dy)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-11, atol=1e-11)


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
@pytest.mark.parametrize(  # torch has no RMS norm of strided ones
    ("module", "layout"), [(LayerNorm, torch.jagged), (LayerNorm, torch.strided), (RMSNorm, torch.jagged)]
)
def test_nested_sequences_are_torchs(module, layout):
    rows = [torch.randn(3, 16), torch.randn(5, 16)]
    nested = torch.nested.nested_tensor(rows, layout=layout)
    for ours, row in zip(module(16)(nested).unbind(), rows, strict=True):
        torch.testing.assert_close(ours, module(16)(row))
