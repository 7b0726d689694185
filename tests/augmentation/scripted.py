"""A scripted generator, critic and scorers, as users' files have them: pure functions of what they are given.

Prompts say what happens to them: ``Stubborn`` is never satisfied, ``Answered`` is answered instead of supplemented
until the generator sees that this was refused, ``Corrected`` gets its complement from the critic.
"""


def reply(task, prompt, complement="", refused=()):
    """Generate or criticise."""
    if task == "generate":
        if "Answered" in prompt and not refused:
            return "The answer is 4."
        return f"Keep it short. ({len(refused)})"
    if "Stubborn" in prompt:
        return {"Reason": "no", "Is_correct": "No", "Faults": ["excess"], "FinalAPE": ""}
    if complement.startswith("The answer"):
        return {"Reason": "it answers", "Is_correct": "No", "Faults": ["answering"], "FinalAPE": ""}
    if "Corrected" in prompt and complement != "For a child.":
        return 'Well: {"Reason": "", "Is_correct": "No", "Final APE": "For a child."}'
    return '{"Reason": "fine", "Is_correct": "Yes", "FinalAPE": ""}'


def length(prompts):
    """Score by length."""
    return [len(prompt) / 10 for prompt in prompts]


def questions(prompts):
    """Score questions only."""
    return [float(len(prompt)) if "?" in prompt else None for prompt in prompts]


def kind(prompts):
    """Label by digits."""
    return ["maths" if any(c.isdigit() for c in prompt) else "writing" for prompt in prompts]


def first_word(prompts):
    """Label by the first word."""
    return [prompt.split()[0].lower() for prompt in prompts]
