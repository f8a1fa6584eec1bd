"""Built-in targets, decoders and losses."""

from __future__ import annotations

import pytest
import torch

from mim_framework.builtins.decoders import LinearDecoder
from mim_framework.builtins.losses import CosineLoss, CrossEntropyLoss, L1Loss, MSELoss
from mim_framework.builtins.targets import FeatureTarget, PixelTarget
from mim_framework.contract.mask import Grid, Mask
from mim_framework.contract.records import Ask, Latent, Masked, Pred
from mim_framework.contract.specs import EncoderSpec, Specs, TargetSpec, ViewSpec
from mim_framework.contract.step import Step
from mim_framework.nn.patches import normalize_patches, patchify

GRID = Grid((2, 2))
VIEWS = {"x": ViewSpec("x", size=(8, 8))}


def specs(**changes) -> Specs:
    return Specs(**{"views": VIEWS, "encoder": EncoderSpec(8, GRID, 4, 1, 1), **changes})


def mask_of(row: list[int], **options) -> Mask:
    return Mask(torch.tensor([row], dtype=torch.bool), GRID, equal=True, **options)


def pixels(norm: bool) -> PixelTarget:
    return PixelTarget(PixelTarget.Config(norm_pix_loss=norm), specs())


def step() -> Step:
    return Step(0, 1, 0.0, 1.0, torch.arange(1), 0, None)


def test_normalised_patches_by_hand():
    values, mean, std = normalize_patches(torch.tensor([[[1.0, 2.0, 3.0]]]))
    assert (mean.item(), std.item()) == (2.0, pytest.approx(1.0))
    assert values.flatten().tolist() == pytest.approx([-1.0, 0.0, 1.0])


def test_pixels_are_taken_at_hidden_positions_of_the_clean_view():
    clean, mixed = torch.rand(1, 3, 8, 8), torch.zeros(1, 3, 8, 8)
    masked = Masked({"x": mask_of([0, 1, 0, 1])}, {"x": mixed}, originals={"x": clean})
    target = pixels(norm=False)(step(), masked)
    assert torch.equal(target.values, patchify(clean, 4)[:, [1, 3]])
    everything = pixels(norm=False)(
        step(), Masked({"x": mask_of([0, 1, 0, 1]).predicting(torch.ones(1, 4))}, {"x": clean})
    )
    assert everything.ids is None
    assert everything.values.shape == (1, 4, 48)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("hidden_only", [False, True])
def test_a_perfect_prediction_reconstructs_the_image(norm, hidden_only):
    image, mask = torch.rand(1, 3, 8, 8), mask_of([0, 1, 0, 1])
    if not hidden_only:
        mask = mask.predicting(mask.hidden)
    target = pixels(norm)
    perfect = target(step(), Masked({"x": mask}, {"x": image}))
    assert torch.allclose(target.reconstruct(perfect, mask, image), image, atol=1e-6)
    wrong = Pred(perfect.values + 1, GRID, perfect.ids)
    changed = (target.reconstruct(wrong, mask, image) - image).abs().reshape(3, 2, 4, 2, 4).amax((0, 2, 4)) > 1e-3
    assert changed.flatten().tolist() == [False, True, False, True]


def test_mse_over_hidden_positions_by_hand():
    mask, ids = mask_of([0, 1, 1, 0]), torch.tensor([[1, 2]])
    values = torch.tensor([[[1.0, 3.0], [0.0, 0.0]]])
    target = torch.zeros(1, 4, 2)
    loss = MSELoss(MSELoss.Config(), specs())
    hidden_only = loss(Pred(values, GRID, ids), target, mask, None).loss
    assert hidden_only.item() == pytest.approx((5.0 + 0.0) / 2)
    everywhere = Pred(torch.tensor([[[9.0, 9.0], [1.0, 3.0], [0.0, 0.0], [9.0, 9.0]]]), GRID)
    assert loss(everywhere, target, mask, None).loss.item() == pytest.approx(2.5)
    assert loss(everywhere, Pred(torch.zeros(1, 2, 2), GRID, ids), mask, None).loss.item() == pytest.approx(2.5)


def test_float_weights_weigh_the_positions():
    mask = mask_of([0, 1, 1, 0]).predicting(torch.tensor([[0.0, 1.0, 0.5, 0.0]]))
    values = torch.tensor([[[9.0], [2.0], [4.0], [9.0]]])
    loss = L1Loss(L1Loss.Config(), specs())
    assert loss(Pred(values, GRID), torch.zeros(1, 4, 1), mask, None).loss.item() == pytest.approx((2.0 + 2.0) / 1.5)


def test_cross_entropy_against_ids_and_probabilities():
    loss = CrossEntropyLoss(CrossEntropyLoss.Config(), specs())
    mask, ids = mask_of([0, 0, 0, 1]), torch.tensor([[3]])
    logits = Pred(torch.tensor([[[0.0, 0.0]]]), GRID, ids)
    assert loss(logits, torch.tensor([[0, 0, 0, 1]]), mask, None).loss.item() == pytest.approx(0.693147, abs=1e-5)
    probabilities = torch.tensor([0.25, 0.75]).expand(1, 4, 2)
    assert loss(logits, probabilities, mask, None).loss.item() == pytest.approx(0.693147, abs=1e-5)


def test_accuracy_and_loss_count_hidden_positions_of_uneven_rows_alike():
    """A mean over all hidden positions, not over images: one row hides two, the other one."""
    mask = Mask(torch.tensor([[1, 1, 0, 0], [0, 0, 1, 0]], dtype=torch.bool), GRID, max_hidden=2)
    logits = torch.tensor(
        [[[2.0, 0.0], [0.0, 1.0], [9.0, 0.0], [9.0, 0.0]], [[9.0, 0.0], [0.0, 9.0], [0.0, 3.0], [0.0, 0.0]]]
    )
    ids = torch.tensor([[0, 0, 1, 1], [1, 0, 1, 1]])
    loss = CrossEntropyLoss(CrossEntropyLoss.Config(), specs())
    chosen = mask.ids_predict
    measured = loss(Pred(logits.gather(1, chosen[..., None].expand(-1, -1, 2)), GRID, chosen), ids, mask, None)
    by_hand = -torch.log_softmax(torch.tensor([[2.0, 0.0], [1.0, 0.0], [3.0, 0.0]]), 1)[[0, 1, 2], [0, 1, 0]].mean()
    assert measured.loss.item() == pytest.approx(by_hand.item())
    assert measured.loss.item() == pytest.approx(loss(Pred(logits, GRID), ids, mask, None).loss.item())
    assert measured.metrics["accuracy"].item() == pytest.approx(2 / 3)
    assert measured.count == 3


def test_cosine_by_hand():
    loss = CosineLoss(CosineLoss.Config(), specs())
    values = torch.tensor([[[3.0, 4.0], [1.0, 0.0], [0.0, 2.0], [5.0, 5.0]]])
    wanted = torch.tensor([[[6.0, 8.0], [0.0, 1.0], [0.0, -1.0], [0.0, 1.0]]])
    assert loss(Pred(values, GRID), wanted, mask_of([1, 1, 1, 0]), None).loss.item() == pytest.approx((0 + 1 + 2) / 3)


def test_pads_of_uneven_rows_are_not_pasted_into_a_reconstruction():
    target = pixels(norm=False)
    mask = Mask(torch.tensor([[0, 1, 0, 0]], dtype=torch.bool), GRID, max_hidden=2)
    view = torch.rand(1, 3, 8, 8)
    pred = Pred(torch.zeros(1, 2, 48), GRID, mask.ids_predict)
    expected = view.clone()
    expected[:, :, :4, 4:] = 0
    assert torch.equal(target.reconstruct(pred, mask, view), expected)


def test_linear_decoder_predicts_at_hidden_positions():
    decoder = LinearDecoder(LinearDecoder.Config(), specs(target=TargetSpec("ids", 5, GRID)))
    tokens = torch.randn(1, 4, 8)
    pred = decoder(Latent(tokens, GRID), mask_of([1, 0, 0, 1]))
    assert decoder.spec.kind == "probs"
    assert torch.allclose(pred.values, decoder.head(tokens)[:, [0, 3]])


def test_linear_decoder_refuses_encoders_that_drop_tokens():
    encoder = EncoderSpec(8, GRID, 4, 1, 1, visible_only=True)
    with pytest.raises(ValueError, match="needs an encoder with a token at every position"):
        LinearDecoder(LinearDecoder.Config(), specs(encoder=encoder, target=TargetSpec("dense", 5, GRID)))
    with pytest.raises(ValueError, match="target grid 4x4, encoder grid 2x2"):
        LinearDecoder(LinearDecoder.Config(), specs(target=TargetSpec("dense", 5, Grid((4, 4)))))


def test_feature_target_normalises_the_teachers_tokens():
    teacher = EncoderSpec(4, GRID, 4, 1, 1)
    target = FeatureTarget(FeatureTarget.Config(teacher="clip"), specs(teachers={"clip": teacher}))
    tokens = torch.randn(1, 4, 4) * 3 + 1

    class Session:
        def encode(self, name, view, mask):
            return Latent(tokens, GRID)

    taught = Step(0, 1, 0.0, 1.0, torch.arange(1), 0, None, teachers=Session())
    values = target(taught, Masked({}, {"x": torch.rand(1, 3, 8, 8)}))
    assert torch.allclose(values.mean(-1), torch.zeros(1, 4), atol=1e-6)
    assert torch.allclose(values.std(-1, correction=0), torch.ones(1, 4), atol=1e-3)
    with pytest.raises(ValueError, match="no teacher 'dino'; the teachers of this recipe are clip"):
        FeatureTarget(FeatureTarget.Config(teacher="dino"), specs(teachers={"clip": teacher}))


class Taught:
    """A teacher of two blocks: a class token, then four tokens of two channels; `passes` says what was asked."""

    spec = EncoderSpec(
        2, GRID, 4, 2, 1, num_prefix_tokens=1, offers=Ask(layers=frozenset({0, 1})),
        layers=dict.fromkeys((0, 1), (2, GRID)),
    )  # fmt: skip
    first = torch.tensor([[[9.0, 7.0], [1.0, 3.0], [2.0, 2.0], [5.0, 1.0], [0.0, 2.0]]])
    second = torch.tensor([[[4.0, 8.0], [3.0, 1.0], [0.0, 4.0], [1.0, 3.0], [2.0, 8.0]]])

    def encode(self, name, view, mask):
        prefix, tokens = 10 * self.second[:, :1], 10 * self.second[:, 1:]  # after a final norm of sorts
        return Latent(tokens, GRID, prefix=prefix, layers={0: self.first, 1: self.second})


def features(**options) -> tuple[FeatureTarget, list]:
    """The target, and what it gives for one image."""
    target = FeatureTarget(FeatureTarget.Config(teacher="t", **options), specs(teachers={"t": Taught.spec}))
    step = Step(0, 1, 0.0, 1.0, torch.arange(1), 0, None, teachers=Taught())
    values = target(step, Masked({}, {"x": torch.zeros(1, 3, 8, 8)}))
    assert values.shape == (1, target.spec.grid.num_patches, target.spec.dim)
    return target, values[0].tolist()


def test_features_are_the_last_tokens_or_those_of_layers_which_are_averaged_or_put_side_by_side():
    target, values = features(normalize=False)
    assert (values[0], target.teacher_asks()) == ([30.0, 10.0], {})
    target, values = features(normalize=False, layers=(0, -1))
    assert target.teacher_asks() == {"t": Ask(layers=frozenset({0, 1}))}
    assert (values, target.spec.dim) == ([[2.0, 2.0], [1.0, 3.0], [3.0, 2.0], [1.0, 5.0]], 2)
    target, values = features(normalize=False, layers=(0, -1), average=False)
    assert values == [[1.0, 3.0, 3.0, 1.0], [2.0, 2.0, 0.0, 4.0], [5.0, 1.0, 1.0, 3.0], [0.0, 2.0, 2.0, 8.0]]
    assert target.spec.dim == 4


def test_each_layer_is_normalised_by_itself_before_the_average():
    """Two channels that differ become -1 and 1, two that are equal become 0."""
    _, values = features(layers=(0, 1))
    assert values == [pytest.approx(each, abs=1e-4) for each in ([0, 0], [-0.5, 0.5], [0, 0], [-1, 1])]
    _, of_average = features(layers=(1,))
    assert of_average == [pytest.approx(each, abs=1e-4) for each in ([1, -1], [-1, 1], [-1, 1], [-1, 1])]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"pool": "mean"}, [15.0, 40.0]),
        ({"pool": "cls"}, [40.0, 80.0]),
        ({"pool": "mean", "layers": (0, 1)}, [(2 + 1.5) / 2, (2 + 4) / 2]),
        ({"pool": "cls", "layers": (0, 1), "average": False}, [9.0, 7.0, 4.0, 8.0]),
    ],
)
def test_pooled_features_stand_for_the_whole_image(options, expected):
    target, values = features(normalize=False, **options)
    assert values == [expected]
    assert target.spec.grid == Grid(())


def test_features_that_the_teacher_has_not_are_refused_by_name():
    bare = EncoderSpec(2, GRID, 4, 2, 1, layers={0: (2, GRID), 1: (3, GRID)})
    for options, message in (
        ({"pool": "cls"}, "pool=cls, but teacher 't' has no class token; use pool=mean"),
        ({"layers": (0, 1)}, r"the layers \[0, 1\] of 't' differ in width or grid"),
    ):
        with pytest.raises(ValueError, match=message):
            FeatureTarget(FeatureTarget.Config(teacher="t", **options), specs(teachers={"t": bare}))


def test_pixels_say_what_their_vectors_are_made_of():
    """(rows, columns, channels): the last number of a patch is the last channel of its last pixel."""
    target = PixelTarget(PixelTarget.Config(patch_size=(4, 2)), specs())
    assert (target.spec.layout, target.spec.dim, target.spec.grid) == ((4, 2, 3), 24, Grid((2, 4)))
    image = torch.arange(3 * 8 * 8).reshape(1, 3, 8, 8).float()
    patch = target(step(), Masked({"x": Mask(torch.ones(1, 8, dtype=torch.bool), target.spec.grid)}, {"x": image}))
    assert torch.equal(patch.values[0, 0].reshape(target.spec.layout)[3, 1], image[0, :, 3, 1])


def test_one_row_of_a_target_stands_for_all_sets_that_are_predicted():
    """Two sets of one sample; pixels are 1, 2, 3, 4, and zeros are predicted everywhere."""
    predict = torch.tensor([[True, False, False, False], [False, False, True, True]])
    mask, loss = mask_of([1, 1, 1, 1]).predicting(predict), L1Loss(L1Loss.Config(), specs())
    wanted = torch.tensor([[[1.0], [2.0], [3.0], [4.0]]])
    measured = loss(Pred(torch.zeros(2, 4, 1), GRID), wanted, mask, None)
    assert (measured.loss.item(), measured.count.item()) == (pytest.approx((1 + 3 + 4) / 3), 3)


def test_a_micro_batch_with_nothing_to_predict_has_a_loss_of_zero_and_a_gradient():
    values = torch.ones(1, 4, 1, requires_grad=True)
    measured = MSELoss(MSELoss.Config(), specs())(
        Pred(values, GRID), torch.zeros(1, 4, 1), Mask(torch.zeros(1, 4, dtype=torch.bool), GRID), None
    )
    measured.loss.backward()
    assert (measured.loss.item(), measured.count.item(), values.grad.abs().sum().item()) == (0, 0, 0)
