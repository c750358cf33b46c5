"""slot_attention.py and recorded steps: on a GPU, the numbers of torch and the samples of the batch loop."""

import pytest
import torch

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("width", [32, 48, 128])
def test_each_query_attends_to_the_keys_up_to_its_position(dtype, tolerance, width):
    from crystallm_kit.engines.slot_attention import slot_attention

    torch.manual_seed(0)
    n_slots, n_heads, n_shared, n_tokens = 33, 6, 2, 200
    query = torch.randn(n_slots, n_heads, 1, width, device="cuda", dtype=dtype)
    keys, values = torch.randn(
        2, n_slots, n_heads // n_shared, n_tokens, width, device="cuda", dtype=dtype
    ).unbind()
    positions = torch.randint(0, n_tokens, (n_slots,), device="cuda")
    found = slot_attention(query, keys, values, positions, width**-0.5)
    seen = (torch.arange(n_tokens, device="cuda") <= positions[:, None])[:, None, None]
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, keys.repeat_interleave(n_shared, 1), values.repeat_interleave(n_shared, 1), attn_mask=seen
    ).transpose(1, 2)
    assert (found - expected).abs().max() < tolerance


def test_recorded_steps_draw_the_samples_of_the_batch_loop():
    """All but those whose draw fell on the border of two tokens: sums are rounded in another order."""
    from crystallm_kit.engines.continuous import ContinuousEngine
    from crystallm_kit.engines.engine import Prompt, Sampling
    from crystallm_kit.generation import compiler, load_model
    from crystallm_kit.records import Conditions

    model = load_model(device="cuda")
    request = compiler(model)(Conditions())
    prompts, sampling = [Prompt(model.template.render(Conditions()), request=request)] * 300, Sampling(seed=5)
    expected = [c.text for c in model.engine.complete(prompts, sampling)]
    engine = ContinuousEngine.over(model.engine, slots=64)
    try:
        found = [c.text for c in engine.complete(prompts, sampling)]
    finally:
        engine.close()
    assert sum(one == other for one, other in zip(found, expected, strict=True)) >= 295
