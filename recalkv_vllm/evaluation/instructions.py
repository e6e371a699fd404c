"""What users ask an assistant. None of it is what a model writes calibration text from."""

from __future__ import annotations

INSTRUCTIONS = (
    "What is the capital of Portugal, and what is it known for?",
    "Explain to a child why it rains.",
    "Give me three tips for a job interview.",
    "Write a function in Python that tells whether a number is prime.",
    "How do I boil an egg?",
    "What is the difference between weather and climate?",
    "List five animals that live in the ocean.",
    "Write a short poem about the sea.",
    "What does a compiler do?",
    "Retell the story of Cinderella in two sentences.",
    "Translate into Spanish: I would like a cup of tea.",
    "What is 17 plus 26? Explain each step.",
    "Name three inventions of the nineteenth century.",
    "Write an email that asks a colleague to move a meeting to Friday.",
    "How does a bicycle stay upright?",
    "How often should I water a cactus?",
)
