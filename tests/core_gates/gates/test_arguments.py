"""What the constructors of gates refuse, and the line that says why."""

from functools import partial

import pytest

from core_gates import (
    ActivationGate,
    CometGate,
    CosineGate,
    DenseToSparseGate,
    DSelectKGate,
    ExpertChoiceGate,
    GShardGate,
    HardConcreteGate,
    HashGate,
    MlpGate,
    NoisyTopKGate,
    ReMoEGate,
    SigmoidGate,
    SinkhornGate,
    SoftmaxGate,
    SoftMoEGate,
    SwitchGate,
    TemperatureSchedule,
    ThresholdGate,
    TopKGate,
    TopPGate,
)

K_0 = ({"k": 0}, "k must lie between 1 and num_experts=4, got 0")
K_5 = ({"k": 5}, "k must lie between 1 and num_experts=4, got 5")
NAN = float("nan")
REFUSED = {
    ActivationGate: [
        ({"activation": "cube"}, "activation is 'cube'; choose one of identity, tanh"),
        ({"tau": 0.0}, "tau must be positive, got 0.0"),
        ({"tau": TemperatureSchedule(1, 2, 3), "learn_tau": True}, "give a number to learn"),
    ],
    CometGate: [
        K_0,
        K_5,
        ({"num_experts": 1, "k": 1}, "num_experts must be at least 2, got 1"),
        ({"gamma": 0.0}, "gamma must be positive and finite, got 0.0"),
        ({"prob_floor": 0.25}, "prob_floor must lie between 0 and 1/num_experts=0.25"),
        ({"log_eps": 0.0}, "log_eps must be positive, got 0.0"),
    ],
    CosineGate: [
        K_5,
        ({"projection_dim": 0}, "projection_dim must be at least 1"),
        ({"tau": 0.001}, "tau must be at least 0.01, got 0.001"),
    ],
    DenseToSparseGate: [
        ({"threshold": 0.25}, "between 0 and 1/num_experts=0.25"),
        ({"threshold": -0.1}, "got -0.1"),
        ({"combine": "sum"}, "combine is 'sum'; choose one of gumbel, softmax"),
    ],
    DSelectKGate: [
        K_0,
        K_5,
        ({"num_experts": 1, "k": 1}, "num_experts must be at least 2, got 1"),
        ({"gamma": -1.0}, "gamma must be positive and finite, got -1.0"),
    ],
    ExpertChoiceGate: [
        ({"capacity_factor": 0}, "capacity_factor must be positive, got 0"),
        ({"capacity_rule": "round"}, "capacity_rule is 'round'"),
        ({"eval_capacity_factor": 0.0}, "capacity_factor must be positive"),
    ],
    GShardGate: [
        ({"num_experts": 1}, "two choices need num_experts of at least 2, got 1"),
        ({"second_policy": "none"}, "second_policy is 'none'; choose one of random, sampling"),
        ({"capacity_factor": 0.0}, "capacity_factor must be positive"),
        ({"capacity_rule": "up"}, "capacity_rule is 'up'"),
    ],
    HardConcreteGate: [
        ({"beta": 0.0}, "beta must be positive"),
        ({"gamma": 0.1}, "gamma must be below 0 and zeta above 1"),
        ({"zeta": 1.0}, "gamma must be below 0 and zeta above 1"),
    ],
    HashGate: [
        ({"num_ids": 4, "k": 5}, "k must lie between 1 and num_experts=4, got 5"),
        ({"num_ids": 0}, "num_ids must be at least 1"),
        ({"num_ids": 4, "table": "even"}, "table is 'even'; choose one of balanced, random"),
        ({"num_ids": 4, "frequencies": [1.0]}, "frequencies must be 4 numbers"),
        ({"num_ids": 4, "frequencies": [1.0, 1.0, 1.0, NAN]}, "frequencies must be 4 numbers"),
        (
            {"num_ids": 4, "frequencies": [1.0] * 4, "table": "random"},
            "a random table takes no frequencies",
        ),
    ],
    MlpGate: [
        ({"hidden_dims": (4, 0)}, r"hidden_dims\[1\] must be at least 1, got 0"),
        ({"norm": "layer"}, "norm is 'layer'"),
    ],
    NoisyTopKGate: [K_0, K_5],
    ReMoEGate: [
        ({"k": 5}, "k must lie between 0 and num_experts=4, got 5"),
        ({"initial_penalty": 0.0}, "initial_penalty must be positive and rate above 1"),
        ({"rate": 1.0}, "initial_penalty must be positive and rate above 1"),
    ],
    SigmoidGate: [
        ({"k": 5}, "k must lie between 1 and the 4 experts"),
        ({"k": 0}, "k must lie between 1"),
        ({"k": 3, "num_groups": 2, "num_kept_groups": 1}, "1 and the 2 experts a token may use"),
        ({"k": 1, "num_groups": 3}, "num_groups must divide num_experts=4, got 3"),
        ({"k": 1, "num_groups": 2, "num_kept_groups": 3}, "num_kept_groups must lie between 1"),
        ({"k": 1, "balance_rate": -1.0}, "balance_rate must not be negative"),
        ({"balance_rate": 1e-3}, "choose among experts: give k"),
        ({"num_groups": 2, "num_kept_groups": 1}, "choose among experts: give k"),
    ],
    SinkhornGate: [
        K_0,
        K_5,
        ({"score": "tanh"}, "score is 'tanh'; choose one of softmax, sigmoid"),
        ({"num_iterations": 0}, "num_iterations must be at least 1, got 0"),
    ],
    SoftMoEGate: [
        ({"initial_scale": 0.0}, "initial_scale"),
        ({"num_slots": 0}, "num_slots must be at least 1, got 0"),
    ],
    SoftmaxGate: [
        ({"dim": 0}, "must be at least 1, got 0"),
        ({"num_experts": 0}, "must be at least 1, got 0"),
        *(({"tau": tau}, "tau must be positive") for tau in (0.0, -1.0, NAN, lambda step: step)),
    ],
    SwitchGate: [
        ({"jitter": 1.0}, r"jitter must lie in \[0, 1\), got 1.0"),
        ({"capacity_factor": 0.0}, "capacity_factor must be positive"),
        ({"eval_capacity_factor": -1.0}, "capacity_factor must be positive"),
        ({"capacity_rule": "round"}, "capacity_rule is 'round'"),
        ({"eval_capacity_rule": "round"}, "capacity_rule is 'round'"),
    ],
    ThresholdGate: [
        ({"threshold": value}, r"threshold must lie in \[0, 1\)") for value in (-0.1, 1.0)
    ],
    TopKGate: [K_0, K_5, ({"dim": 0}, "must be at least 1, got 0")],
    TopPGate: [({"p": p}, r"p must lie in \(0, 1\]") for p in (0.0, 1.1, NAN)],
}


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_arguments_are_checked(refuses, kind):
    sizes = {"dim": 3, "num_experts": 4}
    refuses(ValueError, *((m, partial(kind, **(sizes | options))) for options, m in REFUSED[kind]))
