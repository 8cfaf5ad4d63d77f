import pytest
import torch

import vlm
from vlm.eval import faithfulness
from vlm.eval.explain import View


def test_regions_are_hidden_in_their_order():
    hidden = faithfulness.hidden_in(torch.tensor([2, 0, 1]))
    assert hidden.tolist() == [[1, 1, 1], [1, 1, 0], [0, 1, 0], [0, 0, 0]]


def test_a_large_grid_is_hidden_in_even_steps():
    order = torch.randperm(196)
    hidden = faithfulness.hidden_in(order)
    assert len(hidden) == faithfulness.NUM_POINTS
    assert hidden.sum(dim=1).tolist()[:2] == [196, 184]
    assert not hidden[1][order[:12]].any()


def test_areas_of_a_hand_worked_game(learned):
    """The score of what is shown is 3 for the first region, 1 for the second, 0 for the others."""

    class Game(View):
        def features(self, shown):
            return shown.flatten(1)

    pixels = torch.zeros(1, 3, 4, 4)
    game = Game(learned.model.encoders, pixels, (2, 2))
    worth = torch.tensor([3.0, 1.0, 0.0, 0.0])
    best = torch.tensor([[0, 1, 2, 3]])
    area = faithfulness._area  # the curves: 4, 1, 0, 0, 0 and 0, 3, 4, 4, 4
    assert area(game, worth, best) == pytest.approx((2.5 + 0.5) / 4)
    assert area(game, worth, best.flip(1)) == pytest.approx((1.5 + 3.5 + 4 + 4) / 4)
    assert area(game, worth, torch.cat([best, best.flip(1)])) == pytest.approx(2)


def test_a_learned_explanation_is_faithful_and_that_of_fresh_weights_is_not(learned, painted):
    mine, fresh = [], []
    for seed in range(3):
        picture, objects = painted(seed)
        found = vlm.faithfulness(learned, picture, f"a {objects[0]['name']} square")
        assert found.explained.deletion < found.random < found.explained.insertion
        mine.append(found.explained.insertion - found.explained.deletion)
        fresh.append(found.fresh.insertion - found.fresh.deletion)
    assert sum(mine) > 2 * abs(sum(fresh))


def test_fresh_weights_depend_on_the_seed_alone(learned):
    first, again, other = (faithfulness.reinitialised(learned, seed).model for seed in (0, 0, 1))
    weight = "encoders.image.projection.weight"
    assert torch.equal(first.state_dict()[weight], again.state_dict()[weight])
    assert not torch.equal(first.state_dict()[weight], other.state_dict()[weight])
