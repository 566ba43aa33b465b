"""Compiled blocks write the tokens of blocks as they are, equal ones share a graph, and the model is left alone."""

import shutil
import weakref

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModelForCausalLM

import headfuse.models.compiled as compiled_module
from headfuse.errors import ConfigError
from headfuse.generation.blocks import CompiledBlocks
from headfuse.generation.cache import PreallocatedCache
from headfuse.generation.decoding import Decoder
from headfuse.generation.sampling import Sampling
from headfuse.models.dha import DHA_CLASSES
from pico import pico, pico_config, tokens
from pico_dha import pico_dha

NEW = 12
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


def gqa_llama():
    return pico("llama", num_key_value_heads=2, num_hidden_layers=4)


def llama_of_other_maps():
    """Two key and two value heads in every layer, in groups of other widths."""
    maps = [(0, 0, 1, 1), (0, 1, 1, 1), (0, 0, 0, 1), (1, 0, 1, 0)]
    fields = pico_config("llama", num_hidden_layers=4, initializer_range=0.5).to_dict() | {
        "key_map": maps,
        "value_map": [*maps[1:], maps[0]],
    }
    fields.pop("model_type")
    return AutoModelForCausalLM.from_config(DHA_CLASSES["llama"].config(**fields)).eval()


def ragged() -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of two lengths, padded on the left."""
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    return ids * mask, mask


@pytest.fixture
def graphs(monkeypatch):
    """Counts in `frame_count` what is compiled, by a backend that needs no compiler."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(compiled_module, "BACKEND", counter)
    return counter


@pytest.mark.parametrize(
    ("make", "implementation", "count"),
    [
        (gqa_llama, "sdpa", 1),
        (gqa_llama, "headfuse", 1),
        (llama_of_other_maps, "sdpa", 1),
        (llama_of_other_maps, "headfuse", 1),
        (lambda: pico_dha("llama"), "sdpa", 2),
        (lambda: pico_dha("llama"), "headfuse", 2),
        (lambda: pico("gpt_neox"), "sdpa", 1),
        (lambda: pico("gpt2"), "headfuse", 1),
        (lambda: pico_dha("opt"), "headfuse", 2),
    ],
)
def test_tokens_are_the_same_and_equal_blocks_share_a_graph(make, implementation, count, graphs):
    model, (ids, mask) = make(), ragged()
    model.set_attn_implementation(implementation)
    wanted = Decoder(model, fixed=True).write(ids, mask, max_new_tokens=NEW)
    assert torch.equal(Decoder(model, compiled=True).write(ids, mask, max_new_tokens=NEW), wanted)
    assert graphs.frame_count == count


def test_prompts_of_any_length_run_what_is_compiled_and_another_batch_compiles_again(graphs):
    model = gqa_llama()
    decoder, plain = Decoder(model, compiled=True, room=64), Decoder(model, fixed=True, room=64)
    for ids, count in ((tokens(2, 9), 1), (tokens(2, 30, seed=1), 1), (tokens(3, 9), 2), (tokens(2, 5), 2)):
        found = decoder.write(ids, max_new_tokens=NEW)
        assert torch.equal(found, plain.write(ids, max_new_tokens=NEW))
        assert graphs.frame_count == count


def test_samples_are_the_same(graphs):
    model, options = pico_dha("llama"), {"sampling": Sampling(1.0, top_k=20, top_p=0.9), "eos": [5]}
    wanted = Decoder(model, fixed=True, **options).write(*ragged(), max_new_tokens=NEW, seed=3)
    assert torch.equal(Decoder(model, compiled=True, **options).write(*ragged(), max_new_tokens=NEW, seed=3), wanted)


def state_of(model) -> dict[str, dict[str, object]]:
    """What every module holds of its own, apart from the maps of heads that attention keeps."""
    kept = ("kernel_maps", "indices")
    return {name: {k: v for k, v in vars(each).items() if k not in kept} for name, each in model.named_modules()}


@pytest.mark.parametrize("make", [gqa_llama, lambda: pico_dha("gpt_neox")])
def test_the_model_is_left_as_it_was(make, graphs):
    model, (ids, mask) = make(), ragged()
    for block in model.modules():
        block._compiled_call_impl = None  # as torch's class has it, and as leaving sets it
    before, wanted = state_of(model), Decoder(model).write(ids, mask, max_new_tokens=NEW)
    decoder = Decoder(model, compiled=True)
    decoder.write(ids, mask, max_new_tokens=NEW)
    assert str(state_of(model)) == str(before)
    compiled = graphs.frame_count
    assert torch.equal(Decoder(model).write(ids, mask, max_new_tokens=NEW), wanted)
    assert graphs.frame_count == compiled


def test_what_fails_at_work_leaves_the_model_too():
    model = gqa_llama()
    blocks = CompiledBlocks(model, PreallocatedCache.for_model(model, 1, 8, fixed=True))
    layers = model.model.layers
    with pytest.raises(KeyboardInterrupt), blocks.at_work():
        assert [layer.self_attn.layer_idx for layer in layers] == [0, 0, 0, 0]
        assert all(layer._compiled_call_impl is not None for layer in layers)
        raise KeyboardInterrupt
    assert [layer.self_attn.layer_idx for layer in layers] == [0, 1, 2, 3]
    assert all(layer._compiled_call_impl is None for layer in layers)


def test_a_cache_that_compiled_steps_wrote_goes_with_its_batch(graphs):
    decoder = Decoder(gqa_llama(), compiled=True)
    decoder.write(tokens(2, 5), max_new_tokens=3)
    held = [weakref.ref(tensor) for tensor in decoder.held.cache.tensors()]
    assert all(reference() is not None for reference in held)
    decoder.held = None
    assert all(reference() is None for reference in held)


def test_without_a_compiler_it_says_so(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(ConfigError, match="wanted a C\\+\\+ compiler to compile for a CPU, got none"):
        Decoder(gqa_llama(), compiled=True).write(*ragged(), max_new_tokens=NEW)


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for a CPU takes a C++ compiler")
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # in what torch.compile imports
@pytest.mark.parametrize("make", [gqa_llama, llama_of_other_maps])
def test_fused_kernels_write_the_same(make):
    torch.compiler.reset()
    model, (ids, mask) = make(), ragged()
    model.set_attn_implementation("headfuse")
    wanted = Decoder(model, fixed=True).write(ids, mask, max_new_tokens=NEW)
    assert torch.equal(Decoder(model, compiled=True).write(ids, mask, max_new_tokens=NEW), wanted)


@needs_gpu
@pytest.mark.parametrize("make", [gqa_llama, llama_of_other_maps, lambda: pico_dha("llama")])
@pytest.mark.parametrize("implementation", ["sdpa", "headfuse"])
def test_captured_fused_kernels_write_the_same(make, implementation):
    torch.compiler.reset()
    model, (ids, mask) = make().to("cuda"), ragged()
    model.set_attn_implementation(implementation)
    decoder = Decoder(model, captured=True, compiled=True)
    plain = Decoder(model, captured=False, fixed=True)
    for count in (NEW, 2 * NEW):  # the second time the graph is only replayed
        assert torch.equal(decoder.write(ids, mask, max_new_tokens=count), plain.write(ids, mask, max_new_tokens=count))
