"""Vision-language models of transformers as the body of a robot policy.

``VLMEncoder`` runs picture and instruction through any family of :mod:`pipelines.vlm` once a turn; its cache of keys
and values is the :class:`Prefix`. An expert attends to it (pi0, SmolVLA), or the model's own layers go on from it with
action tokens (OpenVLA, arXiv 2406.09246; decoded in parallel as OpenVLA-OFT does, arXiv 2502.19645).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from mmrl.errors import UserError
from mmrl.types import Prompt
from pipelines.robot.networks import Spaces
from pipelines.robot.vla import Expert, ExpertSize, FlowExpert, Memory, Prefix, TokenExpert, own_state, seen_by
from pipelines.vlm import loading, training
from pipelines.vlm.inputs import Reader
from pipelines.vlm.loading import LoadedVLM
from pipelines.vlm.network import Network, position_ids
from pipelines.vlm.training import Part, VLMLoRA

if TYPE_CHECKING:
    from pipelines.robot.envs import Observation

PARTS: frozenset[Part] = frozenset({"vision", "projector", "language"})


class VLMEncoder(nn.Module):
    """Picture and instruction through a vision-language model.

    Args:
        spaces: of the environment.
        model: folder, ``builtin:NAME`` or hub id, as for the pipeline ``vlm``; or the pair that its loader makes.
        prompt: what the model is asked; ``{instruction}`` stands for the instruction.
        actions: ``expert`` lets an expert of its own weights attend to the model's layers; ``tokens`` lets the model
            itself say action tokens, which are the last ids of its vocabulary.
        expert: sizes of the expert.
        freeze: parts that do not train; all three leave the expert alone.
        lora: adapters to train instead of weights.
        use_state: let the expert know the observed state as well.
        dtype, attention, min_pixels, max_pixels: of the loader.
    """

    def __init__(
        self,
        spaces: Spaces,
        model: str | LoadedVLM,
        prompt: str = "What action should the robot take to {instruction}?",
        actions: Literal["expert", "tokens"] = "expert",
        expert: ExpertSize = ExpertSize(),  # noqa: B008 (frozen)
        freeze: Sequence[Part] = (),
        lora: VLMLoRA | None = None,
        use_state: bool = True,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        attention: str | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ):
        super().__init__()
        if spaces.image_shape is None:
            raise UserError("network 'vlm' reads pictures, but the environment shows none: set its image size")
        if isinstance(model, str):
            model = loading.load_vlm(model, dtype, None, attention, min_pixels, max_pixels)
        loading.check_pair(model.model, model.processor)
        self.model = model.model
        if set(freeze) >= PARTS and lora is None:
            self.model.requires_grad_(False).eval()
        else:
            training.choose_parameters(self.model, lora, freeze, None)
        self.trains = any(parameter.requires_grad for parameter in self.model.parameters())
        self.counters: Counter = Counter()
        self.network = Network(self.model, self.counters)
        self.reader = Reader(self.model, model.processor, self.counters)
        self.prompt = prompt
        self.actions, self.size = actions, expert
        text = self.model.config.get_text_config()
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self.kept = (2, heads, head_dim)
        state_dim = spaces.state_dim if use_state and actions == "expert" else 0
        self.memory = Memory(2 * heads * head_dim, text.num_hidden_layers, state_dim)
        self.context_dim = self.memory.width + state_dim

    def forward(self, observation: Observation) -> Prefix:
        """The prefix of n observations: their keys and values in every layer; equal ones run once.

        Raises:
            UserError: there is no instruction, or the family does not keep what action tokens need.
        """
        if observation.instruction is None:
            raise UserError(
                "network 'vlm' reads an instruction, but the environment gives none: set env_options.instruction"
            )
        seen: dict[tuple[str, bytes], Prompt] = {}
        keys = []
        for image, text in zip(observation.image.cpu(), observation.instruction, strict=True):
            keys.append((text, image.numpy().tobytes()))
            prompt = Prompt(text=self.prompt.format(instruction=text), images=(image.float() / 255,))
            seen.setdefault(keys[-1], prompt)
        read = self.reader.read(list(seen.values()))
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trains):
            _, cache, mask = self.network.prefill(read)
        states = self._flat(cache, mask)
        following = torch.stack([torch.full((len(one.positions),), len(one) + one.delta) for one in read])
        numbers = {key: number for number, key in enumerate(seen)}
        place = torch.tensor([numbers[key] for key in keys], device=mask.device)
        state = own_state(observation, self.memory.state_dim, states, len(keys))
        return Prefix(states[place], mask[place] > 0, state, following.to(mask.device)[place])

    def _flat(self, cache: Any, mask: Tensor) -> Tensor:
        """Keys and values as ``[n, L, S, M]``, float32 whatever the model is."""
        _, heads, head_dim = self.kept
        layers = [(layer.keys, layer.values) for layer in cache.layers if getattr(layer, "keys", None) is not None]
        shape = (len(mask), heads, mask.shape[1], head_dim)
        if len(layers) != self.memory.layers or any(part.shape != shape for layer in layers for part in layer):
            raise UserError(
                f"{type(self.model).__name__} does not keep keys and values of one size for every token in every "
                "layer, which action tokens would attend to: choose a family with full attention, such as Qwen2.5-VL"
            )
        return torch.stack([torch.stack(layer).permute(1, 3, 0, 2, 4).flatten(2) for layer in layers], 1).float()

    def cache(self, prefix: Prefix) -> Any:
        """The cache that a prefix was made of, for the model's own layers to go on from."""
        from transformers import DynamicCache

        parts = prefix.states.to(self.network.dtype).unflatten(3, self.kept).permute(1, 3, 0, 4, 2, 5)
        return DynamicCache(ddp_cache_data=[(layer[0], layer[1]) for layer in parts])

    def chunk_network(self, horizon: int, action_dim: int, time_width: int) -> FlowExpert:
        """What a denoising head asks: an expert that attends to the model's layers (pi0, SmolVLA)."""
        if self.actions == "tokens":
            raise UserError(
                "network.actions is 'tokens', which only the action head 'tokens' can take: set it to expert"
            )
        return FlowExpert(Expert(self.memory, horizon, self.size), action_dim, time_width)

    def token_network(self, queries: int, bins: int) -> nn.Module:
        """What a token head asks: an expert, or the model itself."""
        if self.actions == "tokens":
            return OwnTokens(self, queries, bins)
        return TokenExpert(Expert(self.memory, queries, self.size), bins)


class OwnTokens(nn.Module):
    """What a token head asks, ``network(context, tokens) -> [n, Q, B]``, by the model that made the context.

    The B values of an action token are the last ids of the vocabulary, as in OpenVLA. Decoded in parallel, learned
    place holders stand for the tokens and see one another where the family's attention allows (OpenVLA-OFT); one after
    the other, each token is the model's input for the next.

    Args:
        encoder: that makes the contexts; its weights are not part of this module.
    """

    def __init__(self, encoder: VLMEncoder, queries: int, bins: int):
        super().__init__()
        network = encoder.network
        if network.text_model is None or not network.open_masks:
            raise UserError(
                f"{type(encoder.model).__name__} cannot go on from a prefix with action tokens here: set "
                "network.actions to expert, or choose a family with full attention, such as Qwen2.5-VL"
            )
        if network.vocabulary < bins:
            raise UserError(f"action_head.bins is {bins}, but the model has only {network.vocabulary} token ids")
        # A tuple keeps the module out of this one's own: its weights are the encoder's.
        self._encoder = (encoder,)
        self.first = network.vocabulary - bins
        self.bins = bins
        width = network.model.get_input_embeddings().weight.shape[1]
        self.places = nn.Parameter(torch.zeros(queries, width))

    def forward(self, context: Prefix, tokens: Tensor | None = None) -> Tensor:
        """See :meth:`pipelines.robot.vla.TokenExpert.forward`."""
        (encoder,) = self._encoder
        network = encoder.network
        if tokens is None:
            given = self.places.expand(len(context), -1, -1)
        else:
            said = network.model.get_input_embeddings()(tokens + self.first)
            given = torch.cat([self.places[:1].expand(len(context), -1, -1), said], 1)
        count = given.shape[1]
        network.counters["forward_tokens"] += len(context) * count
        places = context.following[:, :, None] + torch.arange(count, device=given.device)
        output = network.text_model(
            inputs_embeds=given.to(network.dtype),
            attention_mask=seen_by(context.mask, count, causal=tokens is not None),
            position_ids=position_ids(places),
            past_key_values=encoder.cache(context),
            use_cache=True,
        )
        head = network.head
        bias = getattr(head, "bias", None)
        hidden = output.last_hidden_state
        return nn.functional.linear(
            hidden, head.weight[self.first :], None if bias is None else bias[self.first :]
        ).float()
