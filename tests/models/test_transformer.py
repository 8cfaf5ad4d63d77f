import pytest
import torch

from vlm.models.transformer import attention


@pytest.mark.parametrize("causal", [True, False])
def test_bf16_attention_on_the_cpu_agrees_with_the_fused_kernel_in_fp32(causal):
    q, k, v = torch.randn(3, 2, 2, 9, 16)
    expected = attention(q, k, v, causal=causal)
    ours = attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), causal=causal)
    torch.testing.assert_close(ours.float(), expected, rtol=0.05, atol=0.05)
