"""Conversations about a scene in English and Chinese: `ask` writes a question together with its only right answer.

Everything follows from seeds.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from demo.scenes import COLOURS, SHAPES, Scene, Thing

FAMILIES = (
    "what", "describe", "colour", "shape", "count", "where", "compare", "yesno", "read", "followup", "absent",
)  # fmt: skip
LANGUAGES = ("en", "zh")

PLACE_EN = (
    "at the top left", "at the top", "at the top right", "on the left", "in the centre", "on the right",
    "at the bottom left", "at the bottom", "at the bottom right",
)  # fmt: skip
PLACE_ZH = ("左上角", "上方", "右上角", "左边", "中间", "右边", "左下角", "下方", "右下角")
ROW_EN = ("at the top", "in the middle", "at the bottom")
ROW_ZH = ("上方", "中间", "下方")
NUMBER_EN = ("no", "one", "two", "three", "four")
NUMBER_ZH = ("零", "一", "两", "三", "四")
SHAPE_ZH = dict(zip(SHAPES, ("圆形", "方形", "三角形", "星形", "心形", "十字形", "月牙形"), strict=True))
COLOUR_ZH = dict(zip(COLOURS, ("红色", "橙色", "黄色", "绿色", "蓝色", "紫色", "黑色", "白色"), strict=True))
PLURAL = {shape: shape + ("es" if shape == "cross" else "s") for shape in SHAPES}

Turn = tuple[str, str]  # question, answer


def ask(scene: Scene, family: str, language: str, seed: int | str) -> list[Turn] | None:
    """A conversation of the family about the scene, or None where the scene has nothing to ask about.

    All families but `followup` have one turn; the last turn of `followup` needs the earlier ones.
    """
    rng = random.Random(f"ask/{seed}/{family}/{language}")
    return _Asker(scene, rng, language).conversation(family)


class _Asker:
    """Writes questions about one scene in one language; `say` picks the wording by language."""

    def __init__(self, scene: Scene, rng: random.Random, language: str) -> None:
        self.scene = scene
        self.rng = rng
        self.en = language == "en"

    def conversation(self, family: str) -> list[Turn] | None:
        if family == "followup":
            return self.followup()
        turn: Turn | None = getattr(self, family)()
        return [turn] if turn else None

    # Wording

    def say(self, en: Sequence[str], zh: Sequence[str]) -> str:
        return self.rng.choice(en if self.en else zh)

    def item(self, thing: Thing) -> str:
        if self.en:
            return f"{'an' if thing.colour == 'orange' else 'a'} {thing.colour} {thing.shape}"
        return f"一个{COLOUR_ZH[thing.colour]}的{SHAPE_ZH[thing.shape]}"

    def name(self, shape: str | None, colour: str | None = None) -> str:
        if self.en:
            return " ".join(w for w in (colour, shape or "shape") if w)
        return (COLOUR_ZH[colour] + "的" if colour else "") + (SHAPE_ZH[shape] if shape else "图形")

    def place(self, thing: Thing) -> str:
        return (PLACE_EN if self.en else PLACE_ZH)[thing.cell]

    def printed(self) -> str:
        kind = ("number" if self.en else "数字") if self.scene.is_number else ("word" if self.en else "单词")
        if self.en:
            return f"the {kind} {self.scene.text}"
        return f"{kind}{self.scene.text}"

    def join(self, items: list[str]) -> str:
        if len(items) < 2:
            return "".join(items)
        comma, last = (", ", " and ") if self.en else ("、", "和")
        return comma.join(items[:-1]) + last + items[-1]

    def none_of(self, what: str) -> str:
        return f"There is no {what} in the picture." if self.en else f"图中没有{what}。"

    # Choosing what to ask about

    def unique(self) -> list[tuple[Thing, str]]:
        """Things that one name fits, each with that name: by shape, or by colour and shape."""
        found = []
        for thing in self.rng.sample(self.scene.things, len(self.scene.things)):
            same = [t for t in self.scene.things if t.shape == thing.shape]
            if len(same) == 1 and self.rng.random() < 0.7:
                found.append((thing, self.name(thing.shape)))
            elif sum(t.colour == thing.colour for t in same) == 1:
                found.append((thing, self.name(thing.shape, thing.colour)))
        return found

    def unique_shape(self) -> list[Thing]:
        kinds = [t.shape for t in self.scene.things]
        found = [t for t in self.scene.things if kinds.count(t.shape) == 1]
        self.rng.shuffle(found)
        return found

    def unique_colour(self) -> list[Thing]:
        kinds = [t.colour for t in self.scene.things]
        found = [t for t in self.scene.things if kinds.count(t.colour) == 1]
        self.rng.shuffle(found)
        return found

    def missing_shape(self) -> str:
        return self.rng.choice([s for s in SHAPES if all(t.shape != s for t in self.scene.things)])

    def missing_colour(self) -> str:
        return self.rng.choice([c for c in COLOURS if all(t.colour != c for t in self.scene.things)])

    # Families

    def what(self) -> Turn:
        question = self.say(
            ("What is in the picture?", "What do you see?", "What can you see in this image?",
             "What is there?", "List everything in the picture.", "What does the image show?",
             "Name the things you see."),
            ("图中有什么？", "你看到了什么？", "这张图片里有什么？", "画面里有哪些东西？", "列出图中的东西。",
             "图里都有什么？"),
        )  # fmt: skip
        return question, self.list_all()

    def list_all(self) -> str:
        items = [self.item(t) for t in self.scene.things] + ([self.printed()] if self.scene.text else [])
        if not items:
            return "The picture is empty." if self.en else "图中什么也没有。"
        return f"There is {self.join(items)}." if self.en else f"图中有{self.join(items)}。"

    def describe(self) -> Turn:
        question = self.say(
            ("Describe the picture.", "Describe this image in one or two sentences.",
             "Give a short description of the picture.", "Please describe the image.",
             "Describe the picture in detail."),
            ("描述这张图片。", "请用一两句话描述这张图片。", "请简单描述一下这张图片。",
             "描述一下图中的内容。", "请详细描述这张图片。"),
        )  # fmt: skip
        scene, sentences = self.scene, []
        if scene.things:
            if self.en:
                items = [f"{self.item(t)} {self.place(t)}" for t in scene.things]
                sentences.append(f"There is {self.join(items)}.")
            else:
                sentences.append("，".join(f"{self.place(t)}有{self.item(t)}" for t in scene.things) + "。")
        if scene.text and self.en:
            printed = self.printed()
            sentences.append(f"{printed[0].upper()}{printed[1:]} is written {ROW_EN[scene.row]}.")
        elif scene.text:
            sentences.append(f"{ROW_ZH[scene.row]}写着{self.printed()}。")
        if not sentences:
            return question, self.list_all()
        return question, (" " if self.en else "").join(sentences)

    def colour(self) -> Turn | None:
        things = self.unique_shape()
        if not things:
            return None
        if self.rng.random() < 0.3:
            thing = self.rng.choice(self.scene.things)
            where = self.place(thing)
            question = self.say(
                (f"What colour is the shape {where}?", f"Which colour has the shape {where}?"),
                (f"{where}的图形是什么颜色的？", f"{where}那个图形是什么颜色？"),
            )
            if self.en:
                return question, f"The shape {where} is {thing.colour}."
            return question, f"{where}的图形是{COLOUR_ZH[thing.colour]}的。"
        thing = things[0]
        return self.colour_question(thing.shape), self.colour_answer(self.name(thing.shape), thing)

    def colour_question(self, shape: str) -> str:
        name = self.name(shape)
        return self.say(
            (f"What colour is the {name}?", f"What color is the {name}?", f"Which colour is the {name}?",
             f"Tell me the colour of the {name}.", f"The {name} is what colour?"),
            (f"{name}是什么颜色的？", f"{name}是什么颜色？", f"图中的{name}是什么颜色的？",
             f"请问{name}是哪种颜色？"),
        )  # fmt: skip

    def colour_answer(self, name: str, thing: Thing) -> str:
        if self.en:
            return f"{'It' if name == 'it' else 'The ' + name} is {thing.colour}."
        return f"{name}是{COLOUR_ZH[thing.colour]}的。"

    def shape(self) -> Turn | None:
        if not self.scene.things:
            return None
        things = self.unique_colour()
        if not things or self.rng.random() < 0.5:
            thing = self.rng.choice(self.scene.things)
            return self.at_question(self.place(thing)), self.at_answer(thing)
        thing = things[0]
        return self.shape_question(thing.colour), self.shape_answer(thing)

    def at_question(self, where: str) -> str:
        return self.say(
            (f"What is {where}?", f"What do you see {where}?", f"Which shape is {where}?"),
            (f"{where}有什么？", f"{where}是什么？", f"{where}有什么图形？"),
        )

    def at_answer(self, thing: Thing) -> str:
        if self.en:
            return f"There is {self.item(thing)} {self.place(thing)}."
        return f"{self.place(thing)}有{self.item(thing)}。"

    def shape_question(self, colour: str) -> str:
        name = self.name(None, colour)
        return self.say(
            (f"What shape is the {colour} one?", f"Which shape is {colour}?", f"What is the {name}?",
             f"What kind of shape is {colour}?"),
            (f"{name}是什么形状？", f"{name}是什么？", f"哪个形状是{COLOUR_ZH[colour]}的？",
             f"{name}是什么形状的？"),
        )  # fmt: skip

    def shape_answer(self, thing: Thing) -> str:
        name = self.name(None, thing.colour)
        return f"The {name} is a {thing.shape}." if self.en else f"{name}是{SHAPE_ZH[thing.shape]}。"

    def count(self) -> Turn:
        things = self.scene.things
        kind = self.rng.random()
        if not things or kind < 0.3:
            return self.count_question(None, None), self.count_answer(None, None)
        thing = self.rng.choice(things)
        shape, colour = (thing.shape, None) if kind < 0.65 else (None, thing.colour)
        return self.count_question(shape, colour), self.count_answer(shape, colour)

    def count_question(self, shape: str | None, colour: str | None) -> str:
        name = self.name(shape, colour)
        many = " ".join(w for w in (colour, PLURAL[shape] if shape else "shapes") if w)
        return self.say(
            (f"How many {many} are there?", f"How many {many} do you see?", f"Count the {many}.",
             f"What is the number of {many}?"),
            (f"有几个{name}？", f"图中有几个{name}？", f"有多少个{name}？", f"数一数{name}有几个。"),
        )  # fmt: skip

    def count_answer(self, shape: str | None, colour: str | None) -> str:
        n = sum(shape in (None, t.shape) and colour in (None, t.colour) for t in self.scene.things)
        name = self.name(shape, colour)
        if n == 0:
            return self.none_of(name)
        if not self.en:
            return f"有{NUMBER_ZH[n]}个{name}。"
        if n == 1:
            return f"There is one {name}."
        many = " ".join(w for w in (colour, PLURAL[shape] if shape else "shapes") if w)
        return f"There are {NUMBER_EN[n]} {many}."

    def where(self) -> Turn | None:
        found = self.unique()
        if self.scene.text and (not found or self.rng.random() < 0.15):
            row = (ROW_EN if self.en else ROW_ZH)[self.scene.row]
            question = self.say(
                ("Where is the text?", "Where is the writing?"), ("文字在哪里？", "文字在什么位置？")
            )
            return question, f"The text is {row}." if self.en else f"文字在{row}。"
        if not found:
            return None
        thing, name = found[0]
        return self.where_question(name), self.where_answer(name, thing)

    def where_question(self, name: str) -> str:
        return self.say(
            (f"Where is the {name}?", f"Where in the picture is the {name}?", f"Where can I find the {name}?",
             f"In which part of the image is the {name}?"),
            (f"{name}在哪里？", f"{name}在哪儿？", f"{name}在图中的什么位置？", f"{name}在哪边？"),
        )  # fmt: skip

    def where_answer(self, name: str, thing: Thing) -> str:
        if self.en:
            return f"{'It' if name == 'it' else 'The ' + name} is {self.place(thing)}."
        return f"{name}在{self.place(thing)}。"

    def direction(self, a: Thing, b: Thing) -> str:
        """Where a is as seen from b."""
        across = (a.cell % 3 > b.cell % 3) - (a.cell % 3 < b.cell % 3)
        down = (a.cell // 3 > b.cell // 3) - (a.cell // 3 < b.cell // 3)
        if self.en:
            parts = [("above", "", "below")[down + 1], ("to the left of", "", "to the right of")[across + 1]]
            return " and ".join(p for p in parts if p)
        side, height = ("左", "", "右")[across + 1], ("上", "", "下")[down + 1]
        return side + height + ("方" if height else "边")

    def compare(self) -> Turn | None:
        found = self.unique()
        if not found:
            return None
        kind = self.rng.random()
        if len(found) < 2 or kind < 0.2:
            thing, name = found[0]
            question = self.say(
                (f"How big is the {name}?", f"Is the {name} large or small?", f"What size is the {name}?"),
                (f"{name}有多大？", f"{name}是大的还是小的？", f"{name}是大还是小？"),
            )
            return question, self.size_answer(name, thing)
        (a, name_a), (b, name_b) = found[:2]
        if kind < 0.6:
            question = self.say(
                (f"Where is the {name_a} compared with the {name_b}?",
                 f"Where is the {name_a} relative to the {name_b}?",
                 f"On which side of the {name_b} is the {name_a}?"),
                (f"{name_a}在{name_b}的哪边？", f"{name_a}在{name_b}的什么方向？",
                 f"相对于{name_b}，{name_a}在哪边？"),
            )  # fmt: skip
            direction = self.direction(a, b)
            if self.en:
                return question, f"The {name_a} is {direction} the {name_b}."
            return question, f"{name_a}在{name_b}的{direction}。"
        bigger = self.rng.random() < 0.6
        if self.en:
            word = "bigger" if bigger else "smaller"
            question = self.rng.choice(
                (
                    f"Which is {word}, the {name_a} or the {name_b}?",
                    f"What is {word}: the {name_a} or the {name_b}?",
                )
            )
        else:
            word = "大" if bigger else "小"
            question = self.rng.choice(
                (f"{name_a}和{name_b}哪个更{word}？", f"{name_a}和{name_b}相比，哪个{word}？")
            )
        if a.large == b.large:
            return question, "They are the same size." if self.en else "它们一样大。"
        winner = name_a if a.large == bigger else name_b
        return question, f"The {winner} is {word}." if self.en else f"{winner}更{word}。"

    def size_answer(self, name: str, thing: Thing) -> str:
        if self.en:
            return f"{'It' if name == 'it' else 'The ' + name} is {'large' if thing.large else 'small'}."
        return f"{name}是{'大' if thing.large else '小'}的。"

    def yesno(self) -> Turn | None:
        kind = self.rng.random()
        if kind < 0.1:
            question = self.say(
                ("Is there any text?", "Is anything written in the picture?"),
                ("图中有文字吗？", "有文字吗？"),
            )
            if self.scene.text:
                return question, "Yes, there is text." if self.en else "有，图中有文字。"
            return question, "No, there is no text." if self.en else "没有，图中没有文字。"
        if not self.scene.things or kind < 0.5:
            return self.exists()
        found = self.unique()
        if kind < 0.75 or len(found) < 2:
            singles = self.unique_shape()
            if not singles:
                return self.exists()
            thing, name = singles[0], self.name(singles[0].shape)
            colour = thing.colour if self.rng.random() < 0.5 else self.rng.choice(tuple(COLOURS))
            same = colour == thing.colour
            if self.en:
                question = self.rng.choice(
                    (f"Is the {name} {colour}?", f"Is the colour of the {name} {colour}?")
                )
                return question, f"{'Yes' if same else 'No'}, the {name} is {thing.colour}."
            question = self.rng.choice(
                (f"{name}是{COLOUR_ZH[colour]}的吗？", f"{name}是不是{COLOUR_ZH[colour]}的？")
            )
            return question, f"{'是的' if same else '不是'}，{name}是{COLOUR_ZH[thing.colour]}的。"
        (a, name_a), (b, name_b) = found[:2]
        across = a.cell % 3 != b.cell % 3 and (a.cell // 3 == b.cell // 3 or self.rng.random() < 0.5)
        less = a.cell % 3 < b.cell % 3 if across else a.cell // 3 < b.cell // 3
        asked = self.rng.random() < 0.5  # about "less": left, or above
        if self.en:
            words = ("to the left of", "to the right of") if across else ("above", "below")
            question = f"Is the {name_a} {words[not asked]} the {name_b}?"
            yes = "Yes" if asked == less else "No"
            return question, f"{yes}, the {name_a} is {words[not less]} the {name_b}."
        words = ("左边", "右边") if across else ("上方", "下方")
        question = f"{name_a}在{name_b}的{words[not asked]}吗？"
        yes = "是的" if asked == less else "不是"
        return question, f"{yes}，{name_a}在{name_b}的{words[not less]}。"

    def exists(self) -> Turn:
        if self.scene.things and self.rng.random() < 0.5:
            thing = self.rng.choice(self.scene.things)
            shape, colour = thing.shape, thing.colour
        else:
            shape, colour = self.rng.choice(SHAPES), self.rng.choice(tuple(COLOURS))
        named = self.name(shape, colour if self.rng.random() < 0.5 else None)
        with_colour = named != self.name(shape)
        there = any(t.shape == shape and (not with_colour or t.colour == colour) for t in self.scene.things)
        article = "an" if named.startswith("orange") else "a"
        question = self.say(
            (f"Is there {article} {named}?", f"Is there {article} {named} in the picture?",
             f"Do you see {article} {named}?", f"Can you see {article} {named}?"),
            (f"有{named}吗？", f"图中有{named}吗？", f"图中有没有{named}？", f"你能看到{named}吗？"),
        )  # fmt: skip
        if self.en:
            return question, f"Yes, there is {article} {named}." if there else f"No, there is no {named}."
        return question, f"有，图中有{named}。" if there else f"没有，图中没有{named}。"

    def read(self) -> Turn | None:
        if not self.scene.text:
            return None
        en = [
            "What does the text say?",
            "What is written in the picture?",
            "Read the text.",
            "What does it say?",
        ]
        zh = ["图中写着什么？", "上面写了什么？", "请读出图中的文字。", "文字是什么？"]
        if self.scene.is_number:
            en += ["What number is shown?", "Which number do you see?"]
            zh += ["图中的数字是多少？", "写着什么数字？"]
        else:
            en += ["Which word is written there?", "Read the word."]
            zh += ["图中的单词是什么？", "写着什么单词？"]
        return self.say(en, zh), self.read_answer()

    def read_answer(self) -> str:
        kind = ("number" if self.en else "数字") if self.scene.is_number else ("word" if self.en else "单词")
        return f"The {kind} is {self.scene.text}." if self.en else f"{kind}是{self.scene.text}。"

    def absent(self) -> Turn | None:
        shape, colour = self.missing_shape(), self.missing_colour()
        options = ["colour", "where", "count", "shape", "size", "cell"]
        options += [] if self.scene.text else ["read", "read"]
        options += ["compare"] if self.unique() else []
        options += ["kind"] if self.scene.text else []
        kind = self.rng.choice(options)
        if kind == "colour":
            return self.colour_question(shape), self.none_of(self.name(shape))
        if kind == "where":
            return self.where_question(self.name(shape)), self.none_of(self.name(shape))
        if kind == "count":
            if self.rng.random() < 0.5:
                return self.count_question(shape, None), self.none_of(self.name(shape))
            return self.count_question(None, colour), self.none_of(self.name(None, colour))
        if kind == "shape":
            return self.shape_question(colour), self.none_of(self.name(None, colour))
        if kind == "size":
            name = self.name(shape)
            question = self.say(
                (f"How big is the {name}?", f"What size is the {name}?"),
                (f"{name}有多大？", f"{name}是大还是小？"),
            )
            return question, self.none_of(name)
        if kind == "cell":
            taken = {t.cell for t in self.scene.things}
            if self.scene.text:
                taken |= {3 * self.scene.row + i for i in range(3)}
            where = (PLACE_EN if self.en else PLACE_ZH)[
                self.rng.choice([c for c in range(9) if c not in taken])
            ]
            answer = f"There is nothing {where}." if self.en else f"{where}什么也没有。"
            return self.at_question(where), answer
        if kind == "compare":
            _, name = self.unique()[0] if (found := self.unique()) == [] else found[0]
            missing = self.name(shape)
            first, second = (name, missing) if self.rng.random() < 0.5 else (missing, name)
            question = self.say(
                (f"Which is bigger, the {first} or the {second}?",
                 f"Where is the {first} compared with the {second}?"),
                (f"{first}和{second}哪个更大？", f"{first}在{second}的哪边？"),
            )  # fmt: skip
            return question, self.none_of(missing)
        if kind == "kind":
            if self.scene.is_number:
                question = self.say(
                    ("Which word is written there?", "Read the word."), ("图中的单词是什么？",)
                )
                return question, self.none_of("word" if self.en else "单词")
            question = self.say(
                ("What number is shown?", "Which number do you see?"), ("图中的数字是多少？",)
            )
            return question, self.none_of("number" if self.en else "数字")
        question = self.say(
            (
                "What does the text say?",
                "What is written in the picture?",
                "Read the text.",
                "Where is the text?",
            ),
            ("图中写着什么？", "请读出图中的文字。", "文字是什么？", "文字在哪里？"),
        )
        return question, self.none_of("text" if self.en else "文字")

    # Follow-ups

    def followup(self) -> list[Turn] | None:
        kinds = ["list"]
        if self.scene.text:
            kinds += ["text"]
        if self.scene.things:
            kinds += ["thing"] * 4
        if len(self.unique_shape()) > 1:
            kinds += ["other"] * 2
        kind = self.rng.choice(kinds)
        if kind == "list":
            question = self.say(("What are they?", "Which ones?"), ("它们是什么？", "都是什么？"))
            if len(self.scene.things) < 2 or self.scene.text:
                return None
            return [
                (self.count_question(None, None), self.count_answer(None, None)),
                (question, self.list_all()),
            ]
        if kind == "text":
            first = self.read()
            assert first
            question = self.say(("Where is it?", "And where is it?"), ("它在哪里？", "它在哪边？"))
            row = (ROW_EN if self.en else ROW_ZH)[self.scene.row]
            return [first, (question, f"It is {row}." if self.en else f"它在{row}。")]
        if kind == "other":
            a, b = self.unique_shape()[:2]
            about_colour = self.rng.random() < 0.5
            name_a, name_b = self.name(a.shape), self.name(b.shape)
            second = self.say(
                (f"And the {name_b}?", f"What about the {name_b}?"), (f"{name_b}呢？", f"那{name_b}呢？")
            )
            if about_colour:
                first = (self.colour_question(a.shape), self.colour_answer(name_a, a))
                return [first, (second, self.colour_answer(name_b, b))]
            first = (self.where_question(name_a), self.where_answer(name_a, a))
            return [first, (second, self.where_answer(name_b, b))]
        return self.about_one()

    def about_one(self) -> list[Turn] | None:
        """A question that names one thing, then one or two about "it"."""
        found = self.unique()
        if not found:
            return None
        thing, name = found[0]
        rest = ["colour", "where", "size"]
        start = self.rng.choice(("exists", "where", "colour", "cell", "shape"))
        if start == "colour" and name == self.name(thing.shape):
            turns = [(self.colour_question(thing.shape), self.colour_answer(name, thing))]
            rest.remove("colour")
        elif start == "where":
            turns = [(self.where_question(name), self.where_answer(name, thing))]
            rest.remove("where")
        elif start == "cell":
            turns = [(self.at_question(self.place(thing)), self.at_answer(thing))]
            rest.remove("where")
        elif start == "shape" and sum(t.colour == thing.colour for t in self.scene.things) == 1:
            turns = [(self.shape_question(thing.colour), self.shape_answer(thing))]
            rest.remove("colour")
        else:
            article = "an" if name.startswith("orange") else "a"
            question = self.say(
                (f"Is there {article} {name}?", f"Do you see {article} {name}?"),
                (f"有{name}吗？", f"图中有{name}吗？"),
            )
            answer = f"Yes, there is {article} {name}." if self.en else f"有，图中有{name}。"
            turns = [(question, answer)]
        for kind in self.rng.sample(rest, self.rng.choice((1, 1, 2))):
            self.maybe_switch()
            it = "it" if self.en else "它"
            if kind == "colour":
                question = self.say(
                    ("What colour is it?", "And what colour is it?", "Which colour is it?"),
                    ("它是什么颜色的？", "是什么颜色？", "它是什么颜色？"),
                )
                turns.append((question, self.colour_answer(it, thing)))
            elif kind == "where":
                question = self.say(
                    ("Where is it?", "And where is it?", "Where in the picture is it?"),
                    ("它在哪里？", "它在哪边？", "它在什么位置？"),
                )
                turns.append((question, self.where_answer(it, thing)))
            else:
                question = self.say(
                    ("Is it large or small?", "How big is it?", "And how big is it?"),
                    ("它有多大？", "它是大还是小？"),
                )
                turns.append((question, self.size_answer(it, thing)))
        return turns

    def maybe_switch(self) -> None:
        """Now and then a person goes on in the other language."""
        if self.rng.random() < 0.1:
            self.en = not self.en
