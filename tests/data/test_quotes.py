import pytest

from elastic_hf.data.quotes import find_multiline_values


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'a,b\n1,"x"\n', []),
        (b'a,b\n1,"x\ny"\n2,z\n', [(2, 3, b'"x\ny"', b"\n", True)]),
        (
            b'a,b\r\n1,"x\r\n\r\ny",\r\n"p\rq",z',
            [(2, 4, b'"x\r\n\r\ny",', b",", True), (5, 6, b'"p\rq",z', b",", True)],
        ),
        (b'a,b\n1,"say ""hi""\nyes"\n', [(2, 3, b'"say ""hi""\nyes"', b"\n", True)]),
        (b'a,b\n1,"x\n2,"y,3\n', [(2, 3, b'"x\n2,"y,3', b"y", True)]),
        (b'a,b\n1,12" TV\n2,5" disk\n', []),  # no quote within a value opens one
        (b'a,b\n1,"x\n2,y\n', [(2, 4, b'"x\n2,y\n', b"", False)]),
        (b'a,b\n1,"x', [(2, 2, b'"x', b"", False)]),
        (b"a,b\n1,'x\n", []),
    ],
)
def test_multiline_values(content, expected):
    found = find_multiline_values(content, ",")
    assert [(v.first_line, v.last_line, v.text, v.after, v.is_closed) for v in found] == expected


def test_the_delimiter_is_what_a_value_begins_after():
    content = b'a;b\n1,"x\n2;"y\nz"\n'
    assert [value.first_line for value in find_multiline_values(content, ";")] == [3]
    assert [value.first_line for value in find_multiline_values(content.replace(b";", b"|"), "|")] == [3]
