"""Values are checked, and say what is wrong."""

import pytest

from lightning_chatgpt.chat.conversation import Conversation, Message
from lightning_chatgpt.errors import DataError
from tests.conftest import chat


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("bot", "hi"), "role 'bot' is unknown; use system, user, assistant or tool"),
        (("user", 3), "content must be text, not int"),
        (("user", None), "content must be text, not NoneType"),
        (("user", "half \ud83d"), "half a character"),
        (("assistant", "hi", -1.0), "weight must be a finite number of at least 0, not -1.0"),
        (("assistant", "hi", float("nan")), "weight must be a finite number"),
        (("assistant", "hi", True), "weight must be a finite number"),
        (("assistant", "hi", "1"), "weight must be a finite number"),
    ],
)
def test_message_refuses(arguments: tuple, says: str) -> None:
    with pytest.raises(DataError) as error:
        Message(*arguments)
    assert says in str(error.value)


def test_conversation_refuses_no_messages() -> None:
    with pytest.raises(DataError, match="no messages"):
        Conversation(())


def test_split_key_is_the_content_and_not_the_place() -> None:
    a, b = chat("Hello", "Hi"), chat("Hello", "Hi")
    assert a.split_key == b.split_key != chat("Hello", "Hi!").split_key
    # What one says is not what the other says: the border between messages counts.
    assert chat("ab", "c").split_key != chat("a", "bc").split_key


def test_prompt_and_reference() -> None:
    prompt, reference = chat("Hello", "Hi", "How are you?", "Fine").prompt_and_reference()
    assert [m.content for m in prompt.messages] == ["Hello", "Hi", "How are you?"]
    assert reference == "Fine"
    unanswered = chat("Hello", "Hi", "And?")
    assert unanswered.prompt_and_reference() == (unanswered, None)
