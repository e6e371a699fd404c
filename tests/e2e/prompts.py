"""Text for the end-to-end tests."""

from pydoc_data.topics import topics

QUESTIONS = [
    "What is the capital of France?",
    "What color is a clear sky during the day?",
    "Name three animals that live on a farm.",
    "Write one sentence about the sea.",
    "What is two plus two?",
    "Who wrote Romeo and Juliet?",
    "Translate 'good morning' into Spanish.",
    "List the days of the week.",
    "What is the boiling point of water?",
    "Explain gravity to a child.",
    "Give me a recipe for pancakes.",
    "What is the largest planet?",
    "Write a haiku about autumn.",
    "How do I reverse a list in Python?",
    "What does a doctor do?",
    "Name a famous painter and one painting.",
    "Why do leaves fall?",
    "What is the opposite of hot?",
    "Tell me a short joke.",
    "What is photosynthesis?",
    "Complete the proverb: a stitch in time",
]

#: English prose about Python's string formatting that comes with every interpreter.
LONG_TEXT = topics["formatstrings"]
