"""Small files in the forms of HotpotQA, 2WikiMultihopQA and MuSiQue, and what is made of them."""

import json

from atommem_jax.tasks import multihop_files, multihop_qa
from atommem_jax.tasks.multihop_files import MultihopQaConfig

PUBLISHED = {
    "hotpotqa": ("hotpotqa/dev_100.json", 100),
    "2wikimultihopqa": ("2wikimultihopqa/dev_82.json", 82),
    "musique": ("musique/dev_100.jsonl", 100),
}
LISTED = {
    "_id": "q0",
    "question": "Who founded the firm that Ann  works at?",
    "answer": "Bob Stone",
    "supporting_facts": [["Ann", 2], ["Firm", 0], ["Ann", 0]],
    "context": [
        ["Firm", [" It was founded by Bob Stone. ", "It makes bells."]],
        ["Ann", ["Ann is a cook.", " ", "She works\nat Firm"]],
        ["Bells", ["Bells ring."]],
    ],
}
MUSIQUE = {
    "id": "2hop__0",
    "question": "Who founded the firm that Ann works at?",
    "answer": "Bob",
    "answer_aliases": ["Robert", "Bob"],
    "answerable": True,
    "paragraphs": [
        {
            "idx": 4,
            "title": "Firm",
            "paragraph_text": "Bob likes tea. Firm was founded by Bob. It makes bells.",
        },
        {"idx": 7, "title": "Bells", "paragraph_text": "Bells ring."},
        {"idx": 9, "title": "Ann", "paragraph_text": "Ann cooks.  She joined FIRM in 1990."},
    ],
    "question_decomposition": [
        {"question": "Ann >> employer", "answer": "Firm", "paragraph_support_idx": 9},
        {"question": "Who founded #1?", "answer": "Bob", "paragraph_support_idx": 4},
    ],
}


def make_record(number: int, distractors: int = 2, **fields) -> dict:
    """A question of its own over two documents of its own, and others that say nothing."""
    context = [[f"Noise {number}.{i}", [f"Noise {number}.{i} hums."]] for i in range(distractors)]
    context.append([f"Person {number}", [f"Person {number} is at Firm {number}.", "He is glad."]])
    context.append([f"Firm {number}", ["It is old.", f"It is in Town {number}."]])
    return {
        "_id": f"id{number}",
        "question": f"Where is the firm of Person {number}?",
        "answer": f"Town {number}",
        "supporting_facts": [[f"Person {number}", 0], [f"Firm {number}", 1]],
        "context": context,
    } | fields


def write(folder, records, dataset="hotpotqa", **fields) -> MultihopQaConfig:
    path = folder / "published"
    if dataset == "musique":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        path.write_text(json.dumps(records))
    # So far apart that a handful of questions are all in train.
    fields = {"test_every": 10**9, "validation_every": 10**9, "documents": 4} | fields
    return MultihopQaConfig(dataset=dataset, data_file=str(path), **fields)


def generate(config: MultihopQaConfig, split: str = "train") -> list[dict]:
    return list(multihop_qa.generate(config, multihop_files.read(config), split))


def flatten(example: dict) -> list[dict]:
    return [fact for chunk in example["chunks"] for fact in chunk]


def titles(example: dict) -> list[str]:
    """Of the documents in reading order."""
    return list(dict.fromkeys(fact["subject"] for fact in flatten(example)))


def texts_by_note(example: dict) -> dict[str, dict]:
    return {fact["note"]: fact for fact in flatten(example)}
