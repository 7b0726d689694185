"""The defaults of losses are those of TRL's options of the same names, or what the function's own paper has.

The functions are walked over: a new default fails until it is here.
"""

import importlib
import inspect
import pkgutil

from megatron_align import losses

# Of every function that has the parameter, but for those below.
USUAL = {
    "beta": 0.1,
    "label_smoothing": 0.0,
    "alpha": 0.0,
    "discopop_tau": 0.05,
    "desirable_weight": 1.0,
    "undesirable_weight": 1.0,
    "simpo_gamma": 0.5,
    "tpo_l_gamma": 0.5,
    "center_rewards_coefficient": 0.0,
    "gamma": 1.0,
    "gae_lambda": 1.0,
    "scale_rewards": "group",
    "std_eps": 1e-4,
    "unbiased": True,
    "centre": True,
    "mode": "token_truncate",
    "cap": 2.0,
    "epsilon": 0.2,
    "level": "token",
    "sequence_ratio": "mean",
    "sapo_temperature_pos": 1.0,
    "sapo_temperature_neg": 1.05,
    "vespo_k_pos": 2.0,
    "vespo_lambda_pos": 3.0,
    "vespo_k_neg": 3.0,
    "vespo_lambda_neg": 2.0,
    "factor": 1.0,
    "clip": 0.2,
    # of the classes that hold options
    "advantage": "group",
    "unbiased_std": True,
    "normalize_advantages": False,
    "kl_in": "loss",
    "batch_coupled": False,
    "reads_margin": False,
    "loss_type": "dapo",
    "importance_sampling_level": "token",
    "kl_estimator": "k3",
    "use_bias_correction_kl": True,
    "correct_kl": False,
    "corrects_itself": False,
    "mean": 0.0,
    "count": 0,
    "options": (),
}
OWN = {
    "exo_pair.label_smoothing": 1e-3,  # at 0 its loss is infinite
    "tpo_l.beta": 0.01,
    "alpha_divergence.alpha": 0.5,
    "js_divergence.beta": 0.5,
    "AdvantageEstimator.beta": 0.0,
    "AdvantageEstimator.kl_estimator": "k1",  # of a penalty in the reward
    "PolicyGradient.beta": 0.0,
}


def test_every_default():
    found = {}
    for module in pkgutil.iter_modules(losses.__path__):
        names = vars(importlib.import_module(f"{losses.__name__}.{module.name}"))
        for name, what in names.items():
            if name.startswith("_") or not getattr(what, "__module__", "").endswith(f"losses.{module.name}"):
                continue
            if not (inspect.isfunction(what) or inspect.isclass(what)):
                continue
            for parameter in inspect.signature(what).parameters.values():
                default = parameter.default
                if isinstance(default, (bool, int, float, str, tuple)):
                    found[f"{name}.{parameter.name}"] = default
    assert found == {name: OWN.get(name, USUAL.get(name.partition(".")[2])) for name in found}
    assert set(OWN) <= set(found)
    assert set(USUAL) == {name.partition(".")[2] for name in set(found) - set(OWN)}
