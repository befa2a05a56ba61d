"""Small sources for every task about Python, with each label given by hand."""

# (task, source, the population's tokens whose answer is yes, those whose answer is no).
CASES = [
    (
        "loop_body",
        "def f(a):\n"
        "    b = [c for c in a]\n"
        "    for d in a:\n"
        "        e(d)\n"
        "    else:\n"
        "        g()\n"
        "    while h:\n"
        "        i()\n",
        "e d i",
        "b c c a d a g h",
    ),
    (
        "if_body",
        "def f(a):\n"
        "    if a:\n"
        "        b()\n"
        "    elif c:\n"
        "        d()\n"
        "    else:\n"
        "        e()\n",
        "b d",
        "a c e",
    ),
    (
        "else_branch",
        "def f(a):\n"
        "    if a:\n"
        "        b()\n"
        "    elif c:\n"
        "        d()\n"
        "    else:\n"
        "        e()\n"
        "    for g in a:\n"
        "        h()\n"
        "    else:\n"
        "        i()\n"
        "    if j:\n"
        "        k()\n"
        "    else:\n"
        "        if l:\n"
        "            m()\n",
        "e l m",
        "a b c d g a h i j k",
    ),
    (
        "try_body",
        "def f():\n"
        "    try:\n"
        "        a()\n"
        "    except B as c:\n"
        "        d()\n"
        "    else:\n"
        "        e()\n"
        "    finally:\n"
        "        g()\n",
        "a",
        "B c d e g",
    ),
    (
        "except_body",
        "def f():\n"
        "    try:\n"
        "        a()\n"
        "    except (B, C) as c:\n"
        "        d(c)\n"
        "    except E:\n"
        "        raise\n"
        "    finally:\n"
        "        g()\n",
        "d c",
        "a B C c E g",
    ),
    (
        "with_body",
        "def f():\n    with a() as b, c:\n        d(b)\n    e()\n",
        "d b",
        "a b c e",
    ),
    (
        "inner_function",
        "def f(a):\n"
        "    @b\n"
        "    def g(c=d):\n"
        "        return e(lambda h: i)\n"
        "    return g\n"
        "class C:\n"
        "    def j(self):\n"
        "        k()\n",
        "e h i",
        "b g c d g k",
    ),
    (
        "method",
        "def f(a):\n"
        "    b()\n"
        "class C:\n"
        "    x = y\n"
        "    @d\n"
        "    def g(self, z):\n"
        "        self.h = i\n",
        "h i",
        "b",
    ),
    (
        "async_function",
        "async def f(a):\n    await b(a)\ndef g():\n    c()\n",
        "b a",
        "c",
    ),
    ("returned", "def f(a):\n    b = a\n    return b, c(a)\n", "b c a", "b a"),
    ("raised", "def f(a):\n    if a:\n        raise E(a) from b\n", "E a b", "a"),
    (
        "if_test",
        "def f(a):\n"
        "    if a and b(c):\n"
        "        d = e if g else h\n"
        "    elif i:\n"
        "        j()\n",
        "a b c i",
        "d e g h j",
    ),
    (
        "except_type",
        "def f():\n"
        "    try:\n"
        "        a()\n"
        "    except (B, c.D) as e:\n"
        "        g()\n",
        "B c D",
        "a e g",
    ),
    (
        "iterable",
        "def f(a):\n    for b in c(a):\n        d = [e for e in g]\n",
        "c a",
        "b d e e g",
    ),
    (
        "with_item",
        "def f(a):\n    with b(a) as c, d:\n        e()\n",
        "b a d",
        "c e",
    ),
    (
        "assigned_value",
        "def f(a):\n    b = c = d(a)\n    e += g\n    h: i = j\n    k(l=m)\n",
        "d a g j",
        "b c e h i k l m",
    ),
    (
        "argument",
        "def f(a):\n    b(c, d=e)(*g)\n    h[i] = (j)\n",
        "c d e g",
        "b h i j",
    ),
    (
        "compared",
        "def f(a):\n    return a < b <= c(d) and e is not g or h in (i, j)\n",
        "b c d g i j",
        "a e h",
    ),
    (
        "boolean",
        "def f(a):\n    return (a or b.c or d) if not e else g and h\n",
        "b c d h",
        "a e g",
    ),
    (
        "right_side",
        "def f(a):\n    b = a + c * d\n    b += e\n    return g % (h, i)\n",
        "c d h i",
        "b a b e g",
    ),
    (
        "lambda_body",
        "def f(a):\n    return b(lambda c, d=e: c + g)\n",
        "c g",
        "b c d e",
    ),
    ("attribute", "def f(a):\n    a.b.c = self.d(e=g)\n", "b c d", "a e g"),
    ("bracketed", "def f(a):\n    b = c(d)[e] + {g: h}\n    i\n", "d e g h", "b c i"),
    (
        "indented_twice",
        "def f(a):\n    b\n    if c(\n            d):\n        e\nclass C:\n"
        "    def g(self):\n        h\n",
        "e h",
        "b c d",
    ),
    (
        "indented_thrice",
        "def f(a):\n    b\n    if c:\n        if d:\n            e\n        g\n",
        "e",
        "b c d g",
    ),
    (
        "first_of_line",
        "def f(a):\n    a.b = c\n    if a: d\n    e(\n        g)\n    return h\n",
        "a e",
        "b c a d g h",
    ),
    (
        "block_end",
        "def f(a):\n"
        "    if a:\n"
        "        b\n"
        "        c(d,\n"
        "          e)  # words\n"
        "\n"
        "    g\n"
        "h = 1\n",
        "c d e g",
        "a b",
    ),
    (
        "then_newline",
        "def f(a):\n    b = c\n    d(e,\n      g\n    )\n    h  # no\n",
        "c g",
        "b d e h",
    ),
    ("then_call", "def f(a):\n    b(c).d(e)[g]\n    h (i)\n", "b d", "c e g h i"),
    ("then_dot", "def f(a):\n    b.c.d(e .g)\n", "b c", "d e g"),
    (
        "then_equals",
        "def f(a):\n    b = c(d=e)\n    g == h\n    i[j] = k  = l\n",
        "b d",
        "c e g h i j k l",
    ),
    (
        "then_colon",
        "def f(a):\n    b = c[d:e]\n    if g:\n        h = {i: j}\n    k\n",
        "d g i",
        "b c e h j k",
    ),
    (
        "init_method",
        "def f(a):\n"
        "    b\n"
        "class C:\n"
        "    def __init__(self, c):\n"
        "        self.d = c\n"
        "    def e(self):\n"
        "        return self.d\n",
        "d c",
        "d",
    ),
    (
        "import",
        "import a.b as c\nfrom d import (e,\n    f)\ng = a\ndef h():\n    import i\n",
        "a b c d e f",
        "g a h",
    ),
    (
        "decorator",
        "@a.b(c)\nclass D:\n    @property\n    def e(self):\n        return g\nh = 1\n",
        "a b c property",
        "D e h",
    ),
    (
        "class_body",
        "a = 1\nclass C(d):\n    e = g\n    @h\n    def i(self, j):\n        k\nl()\n",
        "e g h i j",
        "a C d l",
    ),
    (
        "base_class",
        "class A(b.C, d=e):\n    f = g(h)\n",
        "b C d e",
        "A f g h",
    ),
    (
        "annotation",
        "a: b = c\ndef d(e: f[g] = h) -> i.j:\n    k: l\n",
        "b f g i j",
        "a c d e h",
    ),
    (
        "comprehension",
        "a = [b(c) for c in d if e]\nf(g, {h: i for h, i in j})\nk(l for l in m)\n",
        "b c c d e h i h i j l l m",
        "g",
    ),
    ("subscript", "a = b[c.d][e:f](g)\nh = [i]\n", "c d e f", "g i"),
    (
        "display",
        "a = [b, c(d)]\ne({f: g}, {h}, (i, j))\nk[l]\n",
        "b c d f g h",
        "i j l",
    ),
    (
        "declared",
        "def a(b, c=d, *e, f: g, **h):\n    i(j, k=l)\n    lambda m: n\n"
        "class C(o): pass\n(lambda p: q)\n",
        "b c e f h p",
        "d g j k l o q",
    ),
    (
        "continued_line",
        "a = b(c, d,\n      e, f)\ng(\n    h,\n    i)\nj(k)\n",
        "e f h i",
        "c d k",
    ),
    ("then_closing", "a(b, c)\nd = [e, f[g]]\nh(i )\n", "c g", "b e f i"),
    ("then_comma", "a(b, c)\nd = (e, f ,)\n", "b e", "c f"),
    ("keyword_name", "a(b, c=d, *e, **f)\ng = h(i(j=k))\n", "c j", "b d e f i k"),
    ("keyword_value", "a(b, c=d + e, *f)\n", "d e", "b c f"),
    ("inner_call", "a(b, c(d, e=f(g)))\nh(i)(j)\n", "d e f g", "b c i j"),
    ("method_argument", "a.b(c, d(e))\nf(g, h.i(j), k=l)\n", "c d e j", "g h i k l"),
    (
        "imported",
        "import a.b\nimport c as d\nfrom e import g\nfrom h import *\n"
        "def i(j, g):\n    import k\n    return a(j) + k + g + d\nl = g\nc(e)\n",
        "a k d g",
        "j g c e",
    ),
    (
        "module_function",
        "def a(b):\n    def c(): d()\n    return a(c, b)\nclass E:\n"
        "    def g(self): g()\na(E)\n",
        "a a",
        "d c b g E",
    ),
    (
        "builtin",
        "def len(a):\n    return print(max, a, len)\nopen(foo, TypeError)\n",
        "print max open TypeError",
        "a len foo",
    ),
    (
        "parameter",
        "d = 1\n"
        "def f(a, *b, c=d, **e):\n"
        "    g = [h + a for h in b]\n"
        "    def i(j):\n"
        "        return a, j, e\n"
        "    return (lambda k: k + g), self, [a for a in c], int\n",
        "a b a j e k c",
        "h g a int",
    ),
    (
        "local",
        "d = 1\n"
        "def f(a):\n"
        "    global m\n"
        "    g = [h for h in a]\n"
        "    m = d\n"
        "    for i, (j, k) in g:\n"
        "        with i as l: print(l, m)\n"
        "    def n(): return g\n"
        "    return n\n",
        "g i l g",
        "h a d print m n",
    ),
    (
        "module_variable",
        "d = e = 1\n"
        "class C: pass\n"
        "def f(a):\n"
        "    global m\n"
        "    m = d\n"
        "    e = 2\n"
        "    return e, d, C, f, m, n\n"
        "n = 2\n",
        "d d n",
        "e C f m",
    ),
    (
        "loop_variable",
        "def f(a):\n"
        "    for b, (c, d) in a:\n"
        "        b(c, [e for e in d])\n"
        "        while a: d(e)\n"
        "    return b\n",
        "b c e d d",
        "a a e b",
    ),
    (
        "own_class",
        "class A(B): pass\ndef f(C):\n    class D: pass\n    return A(C), D, a, A.E\n",
        "A A",
        "B C D",
    ),
    ("of_self", "a.b = self.c.d\nself.e(self)\n", "c e", "b d"),
    ("method_called", "a.b(c.d)\ne.f(g).h()\ni()\n", "b f h", "d"),
    (
        "assigned",
        "a = b\nc, d = e\nf.g = h\ni[j] = k\nl += 1\nm(n)\no: p\nfor q in r:\n    s\n",
        "a c l o",
        "f i m s",
    ),
    (
        "default",
        "def f(a=b, c: d = 2, *, e=None, **g): h(i=j, k=None)\nl = (lambda m=n: 3)\n",
        "b 2 None n",
        "j None",
    ),
    (
        "bracketed_twice",
        "a(b, [c, 1], None)\nd((e, f()), ())\ng(h[i[j]])\n",
        "c 1 e f i j",
        "b None h",
    ),
    ("bracketed_thrice", "a(b[c(d)], [e, {f: 1}])\n", "d f 1", "c e"),
    (
        "docstring",
        '"""Of module."""\n# remark here\nx = "no doc"\n'
        'def f():\n    """Of\n    f."""\n    "after it"\n'
        'class C:\n    "of class"\n    y = 1\n',
        "Of module Of of class",
        "remark here no doc after it",
    ),
    (
        "comment",
        '# one two\nx = "three # four"  # five\ny = \'six\'\n',
        "one two five",
        "three four six",
    ),
    (
        "own_line_comment",
        "# one two\nx = 3  # three\n    # four\ny = [  # five\n    # six\n]\n",
        "one two four six",
        "three five",
    ),
    (
        "function_docstring",
        '"module doc"\nclass C:\n    "class text"\n    def f(self):\n'
        '        r"method text"\ndef g():\n    """func"""\n',
        "method text func",
        "module doc class text",
    ),
    (
        "f_string",
        '"""doc"""\nx = f"one {two!r:>{three}} four" + rf\'five\' + "six {seven}"\n'
        "y = b'eight' # nine\nz = F'''ten\n{'eleven'} twelve'''\n",
        "one two three four five ten eleven twelve",
        "six seven eight",
    ),
    (
        "string_argument",
        'a("one", b="two", c=["three"])\nd = "four"\n'
        'e(f"five", "six" "seven", "no" + g)\n',
        "one two five six seven",
        "three four no",
    ),
    (
        "single_quoted",
        "'''doc'''\na = 'one \"two\"' + \"three 'four\"\n"
        "b = b'five' + '''six''' + f\"\"\"ten\"\"\"\n",
        "one two five six",
        "three four ten",
    ),
    (
        "subtraction",
        "a = - b - 1\nc = d(e) - f[-1] - -2\ng = h(i, - 3)\n",
        "- - -",
        "- - -",
    ),
    (
        "multiplication",
        "def f(a, *b): return a * 2, *b\nc = (d) * e\ng(h, *i)\nj *= k**2\n",
        "* *",
        "* * *",
    ),
    (
        "argument_comma",
        "a(b, c)\nd = [e, f(g, (h, 1), i[j, k])]\ndef l(m, n): return m, n\n",
        ", ,",
        ", , , , ,",
    ),
    (
        "header_colon",
        "if a:\n    b = {c: d}\nx: int = 1\nwhile lambda e: e: pass\n"
        "def f(g: h): return i[j: k]\n",
        ": :",
        ": : : : :",
    ),
    (
        "if_statement",
        "if a:\n    b = c if d else e\n    if g: pass\nh = [i for i in j if k]\n",
        "if if",
        "if if",
    ),
    (
        "for_statement",
        "for a in b:\n    c = [d for d in e for g in h]\nasync def i():\n"
        "    async for j in k: pass\n",
        "for for",
        "for for",
    ),
    (
        "in_of_for",
        "for a in b in c:\n    d = e in g, [h for h in (i in j) if k in l]\n"
        "m not in n\n",
        "in in",
        "in in in in in",
    ),
    (
        "else_of_if",
        "if a:\n    b\nelif c:\n    d\nelse:\n    for e in g:\n        h\n"
        "    else:\n        x = i if j else k\n"
        "try:\n    l\nexcept M:\n    if n: pass\nelse:\n    o\n",
        "else",
        "else else",
    ),
    (
        "as_of_import",
        "import a as b\nfrom c import d as e\nwith g as h: pass\n"
        "try: pass\nexcept I as j: pass\n",
        "as as",
        "as as",
    ),
    (
        "none_default",
        "def f(a=None, b=c(None)): return None\ng(None, h=None)\n",
        "None None",
        "None None None",
    ),
    (
        "none_argument",
        "def f(a=None): return None\ng(None, h=None, *[None])\ni[None] = j is None\n",
        "None None None",
        "None None None None",
    ),
]
