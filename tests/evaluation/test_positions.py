from recalkv_vllm.evaluation.positions import by_position


def test_buckets_double_and_end_with_the_windows():
    losses = [[float(i) for i in range(1, 40)], [0.0] * 39]
    rows = by_position(losses)
    assert [(row["start"], row["end"], row["tokens"]) for row in rows] == [
        (1, 16, 30),
        (16, 32, 32),
        (32, 40, 16),
    ]
    assert [row["nll"] for row in rows] == [4.0, 11.75, 17.75]


def test_windows_shorter_than_the_first_bucket():
    (row,) = by_position([[1.0, 3.0]])
    assert row == {"start": 1, "end": 3, "nll": 2.0, "tokens": 2}
