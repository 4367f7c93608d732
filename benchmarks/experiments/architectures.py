"""Public architectures: whether each is traced, how much is free, whether its fusion is right.

The networks are those of libraries that are installed (``pip install flwr-fusion[architectures]``);
others are left out. Nothing is downloaded: all weights are random. Without the extra one network of
torchvision shows that everything runs.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

import flwr_fusion as ff
from benchmarks.bench import Bench
from benchmarks.declarations import GROUP, Experiment, Scores
from flwr_fusion.observe import call, moved_to, tensors_of

CLASSES = 10
# The joint sweep takes long for large networks; it is needed where the greedy one finds too little.
GREEDY = ff.Matching(sweep="greedy")
WRONG = 1e-3
# One of each family.
TIMM = (
    "beit_base_patch16_224",
    "caformer_s18",
    "cait_xxs24_224",
    "coat_lite_tiny",
    "convnext_atto",
    "crossvit_tiny_240",
    "cspresnet50",
    "davit_tiny",
    "deit_tiny_patch16_224",
    "densenet121",
    "dla34",
    "dpn68",
    "edgenext_xx_small",
    "efficientformer_l1",
    "efficientnet_b0",
    "eva02_tiny_patch14_224",
    "fastvit_t8",
    "focalnet_tiny_srf",
    "gcvit_xxtiny",
    "ghostnet_050",
    "gmlp_s16_224",
    "hardcorenas_a",
    "hiera_tiny_224",
    "hrnet_w18_small",
    "inception_next_tiny",
    "inception_v3",
    "levit_128s",
    "maxvit_rmlp_pico_rw_256",
    "mixer_s32_224",
    "mobilenetv3_small_050",
    "mobilevit_xxs",
    "mvitv2_tiny",
    "nfnet_f0",
    "pit_ti_224",
    "poolformer_s12",
    "pvt_v2_b0",
    "regnetx_002",
    "repghostnet_050",
    "repvgg_a0",
    "res2net50_14w_8s",
    "resmlp_12_224",
    "resnest14d",
    "resnet18",
    "rexnet_100",
    "selecsls42",
    "sequencer2d_s",
    "seresnet18",
    "skresnet18",
    "starnet_s1",
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "tiny_vit_5m_224",
    "tnt_s_patch16_224",
    "twins_pcpvt_small",
    "visformer_tiny",
    "vit_tiny_patch16_224",
    "volo_d1_224",
    "vovnet39a",
    "xception41",
    "xcit_nano_12_p16_224",
)
TRANSFORMERS = (
    "BERT",
    "DistilBERT",
    "BERT, masked",
    "GPT-2",
    "Llama",
    "Llama, grouped queries",
    "T5",
    "ViT",
    "Whisper",
)
MONAI = (
    "UNet",
    "UNet 3D",
    "BasicUNet",
    "DynUNet",
    "SegResNet",
    "SwinUNETR",
    "AttentionUnet",
    "VNet",
)
SEGMENTATION = ("Unet", "FPN", "DeepLabV3Plus")
TORCHVISION = (
    "ssdlite320_mobilenet_v3_large",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "r3d_18",
    "mc3_18",
    "shufflenet_v2_x0_5",
    "googlenet",
)
GEOMETRIC = ("GCN", "GAT", "GraphSAGE")


@dataclass(frozen=True)
class Network:
    """A public architecture.

    Parameters
    ----------
    library : str
        The package that has it.
    name : str
        Its name there.
    """

    library: str
    name: str

    def build(self) -> tuple[nn.Module, Any]:
        """Return the network, small where its configuration allows, and example inputs."""
        model, inputs = _BUILDERS[self.library](self.name)
        return model.eval(), inputs


def _timm(name: str) -> tuple[nn.Module, Any]:
    import timm

    model = timm.create_model(name, pretrained=False, num_classes=CLASSES)
    return model, torch.randn(1, *model.default_cfg["input_size"])


def _transformers(name: str) -> tuple[nn.Module, Any]:
    import transformers as hf

    ids = torch.randint(1, 90, (2, 7))
    block = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    small = {**block, "num_attention_heads": 4, "vocab_size": 100, "max_position_embeddings": 16}
    if name == "BERT":
        return hf.BertForSequenceClassification(hf.BertConfig(**small)), {"input_ids": ids}
    if name == "BERT, masked":
        return hf.BertForMaskedLM(hf.BertConfig(**small)), {"input_ids": ids}
    if name == "DistilBERT":
        config = hf.DistilBertConfig(
            vocab_size=100, dim=32, hidden_dim=64, n_layers=2, n_heads=4, max_position_embeddings=16
        )
        return hf.DistilBertForSequenceClassification(config), {"input_ids": ids}
    if name == "GPT-2":
        config = hf.GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=4, n_positions=16)
        return hf.GPT2LMHeadModel(config), {"input_ids": ids}
    if name.startswith("Llama"):
        heads = 2 if "grouped" in name else 4
        return hf.LlamaForCausalLM(hf.LlamaConfig(**small, num_key_value_heads=heads)), {
            "input_ids": ids
        }
    if name == "T5":
        config = hf.T5Config(
            vocab_size=100,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
        )
        return hf.T5ForConditionalGeneration(config), {"input_ids": ids, "decoder_input_ids": ids}
    if name == "ViT":
        config = hf.ViTConfig(**block, num_attention_heads=4, image_size=32, patch_size=8)
        return hf.ViTForImageClassification(config), {"pixel_values": torch.randn(2, 3, 32, 32)}
    config = hf.WhisperConfig(
        vocab_size=100,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_mel_bins=8,
        max_source_positions=20,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
    )
    features = torch.randn(2, 8, 40)
    return hf.WhisperForConditionalGeneration(config), {
        "input_features": features,
        "decoder_input_ids": ids,
    }


def _monai(name: str) -> tuple[nn.Module, Any]:
    from monai.networks import nets

    flat, solid = torch.randn(1, 1, 64, 64), torch.randn(1, 1, 32, 32, 32)
    plane = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2}
    steps = {"channels": (8, 16, 32), "strides": (2, 2)}
    made: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
        "UNet": lambda: (nets.UNet(**plane, **steps, num_res_units=2), flat),
        "UNet 3D": lambda: (nets.UNet(**{**plane, "spatial_dims": 3}, **steps), solid),
        "BasicUNet": lambda: (nets.BasicUNet(**plane, features=(8, 8, 16, 16, 32, 8)), flat),
        "DynUNet": lambda: (
            nets.DynUNet(2, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[8, 16, 32]),
            flat,
        ),
        "SegResNet": lambda: (nets.SegResNet(**plane, init_filters=8), flat),
        "SwinUNETR": lambda: (nets.SwinUNETR(**plane, feature_size=12), flat),
        "AttentionUnet": lambda: (nets.AttentionUnet(**plane, **steps), flat),
        "VNet": lambda: (nets.VNet(**plane), flat),
    }
    return made[name]()


def _segmentation(name: str) -> tuple[nn.Module, Any]:
    import segmentation_models_pytorch as smp

    model = getattr(smp, name)("resnet18", encoder_weights=None, classes=2)
    return model, torch.randn(1, 3, 64, 64)


def _torchvision(name: str) -> tuple[nn.Module, Any]:
    import torchvision

    if "rcnn" in name or name.startswith("ssd"):
        options = {"weights": None, "weights_backbone": None, "num_classes": CLASSES}
        return torchvision.models.get_model(name, **options), ([torch.rand(3, 320, 320)],)
    model = torchvision.models.get_model(name, weights=None, num_classes=CLASSES)
    video = dict.fromkeys(("r3d_18", "mc3_18"), (3, 8, 32, 32))
    return model, torch.randn(1, *video.get(name, (3, 64, 64)))


def _geometric(name: str) -> tuple[nn.Module, Any]:
    from torch_geometric.nn import models

    edges = torch.tensor([[0, 1, 2, 3, 1], [1, 2, 3, 0, 3]])
    return getattr(models, name)(6, 16, 2, 4), (torch.randn(4, 6), edges)


_BUILDERS: dict[str, Callable[[str], tuple[nn.Module, Any]]] = {
    "timm": _timm,
    "transformers": _transformers,
    "monai": _monai,
    "segmentation_models_pytorch": _segmentation,
    "torchvision": _torchvision,
    "torch_geometric": _geometric,
}


def networks() -> Iterator[Network]:
    """Yield the networks of the libraries that are installed; without the extra, one."""
    if find_spec("timm") is None:
        yield Network("torchvision", "shufflenet_v2_x0_5")
        return
    families = (TIMM, TRANSFORMERS, MONAI, SEGMENTATION, TORCHVISION, GEOMETRIC)
    for library, names in zip(_BUILDERS, families, strict=True):
        if find_spec(library) is not None:
            yield from (Network(library, name) for name in names)


@torch.no_grad()
def _output(model: nn.Module, inputs: Any) -> Tensor:
    torch.manual_seed(0)
    found = tensors_of(call(model, moved_to(model, inputs)))
    return torch.cat([t.double().flatten() for t in found if t.is_floating_point()])


def _difference(one: nn.Module, other: nn.Module, inputs: Any) -> float:
    found, expected = _output(one, inputs), _output(other, inputs)
    if found.shape != expected.shape:
        return float("inf")
    return float((found - expected).norm() / expected.norm().clamp(min=1e-12))


def measure(_bench: Bench, network: Network) -> Scores:
    """Trace a network; fuse it with a permuted copy, alone, and with another one."""
    torch.manual_seed(0)
    model, inputs = network.build()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        started = time.perf_counter()
        graph = ff.ChannelGraph.trace(model, inputs)
        seconds = time.perf_counter() - started
        free = [g for g in graph.groups if not g.fixed]
        total = sum(g.size for g in graph.groups if "of the network" not in g.fixed_because)
        orders = {g.name: torch.randperm(g.size) for g in free}
        torch.manual_seed(0)
        copy, _ = network.build()
        state = model.state_dict()
        copy.load_state_dict({**state, **graph.permute(state, orders)})
        fuse = partial(ff.ot_fusion, example_inputs=inputs, repair="none", matching=GREEDY)
        fused = fuse([model, copy]).model
        if _difference(fused, model, inputs) > WRONG:
            fused = fuse([model, copy], matching=ff.Matching()).model
        alone = fuse([model]).model
        other, _ = network.build()
        both = fuse([model, other]).model
        average = ff.average([model, other]).model
    scores = {
        "seconds": seconds,
        "free %": 100 * sum(g.size for g in free) / max(total, 1),
        "permuted": _difference(copy, model, inputs),
        "fused with it": _difference(fused, model, inputs),
        "alone": _difference(alone, model, inputs),
        "two": float(_output(both, inputs).isfinite().all()),
        "average": float(_output(average, inputs).isfinite().all()),
    }
    return {f"{network.library}{GROUP}{network.name}": scores}


EXPERIMENTS = (
    Experiment(
        "architectures",
        "Public architectures: seconds of the trace, free channels, and errors of what is fused",
        measure,
        "result",
        "random weights; 'permuted': a copy with all free groups permuted",
        cases=list(networks()),
        data="",
        rows=GROUP.join(("library", "network")),
        unit="seconds, %, relative errors, whether outputs are finite",
        decimals=6,
        many_seeds=False,
    ),
)
