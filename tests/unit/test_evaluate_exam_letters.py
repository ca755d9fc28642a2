"""Which letter a generated answer states: what counts, what does not, in Chinese and English."""

from __future__ import annotations

import pytest

from components.evaluate.exam_letters import Extraction, Reading, extract_letters

DRUGS = {"A": "阿司匹林", "B": "对乙酰氨基酚", "C": "difficile 感染", "D": "胰岛素", "E": "无"}

STATED = [
    # the answer opens with a letter
    ("B", "B"),
    ("b", "B"),
    ("(b)", "B"),
    ("Ｂ", "B"),
    ("B.", "B"),
    ("B。", "B"),
    ("(B)", "B"),
    ("（B）对乙酰氨基酚", "B"),
    ("**B**", "B"),
    ("B. 对乙酰氨基酚", "B"),
    ("B、对乙酰氨基酚。理由如下", "B"),
    ("B 对乙酰氨基酚", "B"),
    ("B：对乙酰氨基酚", "B"),
    ("B对乙酰氨基酚", "B"),
    ("C. difficile 感染", "C"),
    ("E. 无", "E"),
    ("选项B。", "B"),
    ("Option B", "B"),
    ("B\n\n因为它更安全，A会出血。", "B"),
    ("B，因为它更安全。答案也可能被误认为A。", "B"),
    ("B. 对乙酰氨基酚\nA. 阿司匹林会引起出血", "B"),
    ("A because it thins the blood", "A"),
    # a letter is announced
    ("答案是B", "B"),
    ("答案：B", "B"),
    ("答案 : B。", "B"),
    ("正确答案为 B。", "B"),
    ("正确答案：B. 对乙酰氨基酚", "B"),
    ("【答案】B", "B"),
    ("答案应该是“B”", "B"),
    ("本题选B。", "B"),
    ("故选：B", "B"),
    ("应选择B项。", "B"),
    ("我选B，因为安全", "B"),
    ("不选A，选C", "C"),
    ("答案不是A，答案是D。", "D"),
    ("容易误选A，正确答案是B。", "B"),
    ("答案是B，不是A", "B"),
    ("答案是B，A选项错误", "B"),
    ("正确答案是选项 B：对乙酰氨基酚。", "B"),
    ("正确选项的字母是B", "B"),
    ("应选D而不是A", "D"),
    ("A、B错误，故选D", "D"),
    ("正確答案為B。", "B"),
    ("應選B", "B"),
    ("A good answer is B", "B"),
    ("A和B都可以，但最佳答案是B。", "B"),
    ("The answer is (B).", "B"),
    ("The answer is B because it is safer.", "B"),
    ("The correct answer is: **B. 对乙酰氨基酚**", "B"),
    ("Answer: D", "D"),
    ("I would choose B.", "B"),
    ("I would not choose A, I would choose B.", "B"),
    ("The answer is not A. The correct option is D.", "D"),
    (r"所以 $\boxed{B}$", "B"),
    (r"\boxed{\text{B}}", "B"),
    ("<think>也许是A？选A吧</think>\n\nB", "B"),
    ("A. 阿司匹林\nB. 对乙酰氨基酚\nC. difficile 感染\nD. 胰岛素\nE. 无\n答案：D", "D"),
    # a letter is called the answer
    ("因为安全，所以B是正确答案。", "B"),
    ("Therefore, B is the correct answer.", "B"),
    # the first statement counts, right or wrong
    ("答案是A。再想一想，答案是B。", "A"),
]

NOTHING = [
    "对乙酰氨基酚",
    "B超检查提示胆囊结石",
    "B 超检查提示胆囊结石",
    "A型血的人可以输O型血",
    "AB型血",
    "ABO血型不合",
    "ACE抑制剂",
    "A good diet helps.",
    "A patient with fever",
    "C. difficile is treated with vancomycin",
    "The answer is E. coli",
    "D-dimer 升高",
    "D二聚体升高",
    "B12 缺乏",
    "A?",
    "是A吗？",
    "答案是A吗？",
    "A不是正确答案",
    "A不对",
    "答案是A类药物",
    "选择A、B、C、D中的一项",
    "The answer is A healthy diet",
    "选项A：错误。选项B：正确。",
    "A. 错误\nB. 正确",
    "A: incorrect. B: correct.",
    "不选A",
    "不应该选A",
    "首选A药",
    "首选B超检查",
    "可选择B族维生素",
    "答案不是A",
    "The answer is not A",
    "Do not choose A",
    "Vitamin B is the best choice",
    "A和B都对",
    "A and B are both wrong",
    "Neither A nor B is right",
    "A. 阿司匹林\nB. 对乙酰氨基酚\nC. difficile 感染\nD. 胰岛素\nE. 无",
    "A. 阿司匹林 B. 对乙酰氨基酚 C. difficile 感染 D. 胰岛素",
    "A. 阿司匹林\nB. 对乙酰氨",  # an echo that the token limit cut
    "A. 阿司匹林\nB",
    "A. 布洛芬\nB. 阿司匹林\nC. 别的\n下次再来",  # an echo with other texts
    "请选择正确答案",
    "F",
    "答案：F",
    "我不知道。",
    "高血压患者应低盐饮食。",
]

AMBIGUOUS = ["A或B", "答案是A和B", "答案：A、B", "AB", "选A还是选B", "The answer is A or B.", "The answer is A and B.", "A, B"]


@pytest.mark.parametrize(("text", "letter"), STATED)
def test_a_clear_statement_is_read(text: str, letter: str) -> None:
    assert extract_letters(text, DRUGS) == Extraction(letter, "stated")


@pytest.mark.parametrize("text", NOTHING)
def test_what_states_no_letter_is_not_read(text: str) -> None:
    assert extract_letters(text, DRUGS) == Extraction("", "none")


@pytest.mark.parametrize("text", AMBIGUOUS)
def test_two_letters_are_ambiguous(text: str) -> None:
    assert extract_letters(text, DRUGS) == Extraction("", "ambiguous")


@pytest.mark.parametrize("text", ["", "  \n", "**"])
def test_an_empty_answer_is_called_empty(text: str) -> None:
    assert extract_letters(text, DRUGS) == Extraction("", "empty")


@pytest.mark.parametrize(
    ("text", "letters"),
    [
        ("ABD", "ABD"),
        ("A、B、D", "ABD"),
        ("D, B, A", "ABD"),
        ("A B D", "ABD"),
        ("答案：ABD。", "ABD"),
        ("答案是A、B和D", "ABD"),
        ("The answers are A and D", "AD"),
        ("The answer is A, B and D.", "ABD"),
        ("A. 阿司匹林\nB. 对乙酰氨基酚\nD. 胰岛素", "ABD"),
        ("B", "B"),
        ("(A)(B)(D)", "ABD"),
    ],
)
def test_several_letters_are_read_where_several_may_be_right(text: str, letters: str) -> None:
    assert extract_letters(text, DRUGS, several=True) == Extraction(letters, "stated")


@pytest.mark.parametrize(
    ("text", "reading"),
    [
        ("A或B", "ambiguous"),
        ("A or B", "ambiguous"),
        ("A和B都不对", "none"),
        ("ACE抑制剂", "none"),
        ("A. 阿司匹林\nB. 对乙酰氨", "none"),
        ("\n".join(f"{letter}. {text}" for letter, text in DRUGS.items()), "none"),
    ],
)
def test_alternatives_and_echoes_are_no_set(text: str, reading: Reading) -> None:
    assert extract_letters(text, DRUGS, several=True) == Extraction("", reading)
