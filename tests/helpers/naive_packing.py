"""First-fit decreasing, row by row, and what every packing must satisfy."""


def naive_first_fit_decreasing(lengths, capacity):
    """Every row is tried in turn: O(n^2)."""
    rows = []
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for row in rows:
            if sum(lengths[i] for i in row) + lengths[item] <= capacity:
                row.append(item)
                break
        else:
            rows.append([item])
    return rows


def check_rows(rows, lengths, capacity):
    """Every item in exactly one row, and no row over its capacity."""
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= capacity for row in rows)
