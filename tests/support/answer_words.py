"""Words and sentences as answers and clips of the field have them, written for these tests."""

# Emotion words that people and models say; the shipped wheels know all of them.
COMMON_WORDS = (
    *("happy", "sad", "angry", "afraid", "surprised", "disgusted", "calm", "anxious", "joyful", "delighted"),
    *("worried", "nervous", "furious", "frustrated", "disappointed", "excited", "hopeful", "relieved", "grateful"),
    *("proud", "ashamed", "guilty", "lonely", "confused", "curious", "doubtful", "serious", "contemptuous"),
    *("helpless", "pleased", "annoyed", "irritated", "content", "satisfied", "tense", "fearful", "sorrowful"),
    *("shocked", "amused", "bored", "indifferent", "determined", "confident", "sympathetic", "caring"),
    *("affectionate", "grief", "resigned", "bitter", "jealous", "embarrassed", "apologetic", "apprehensive"),
    *("cheerful", "depressed", "hurt", "regretful", "concerned", "positive", "dissatisfied", "sarcastic"),
    *("mocking", "panicked", "terrified", "thoughtful", "friendly", "loving", "impatient", "unhappy", "upset"),
    *("enthusiastic", "nostalgic"),
)

SUBTITLES = (
    "I told you not to come back here.",
    "You really did all of this for me?",
    "It's fine. It's fine, honestly, I just need a minute.",
    "We have been waiting for this day for eleven years, and now it's finally here!",
    "Why would you say that in front of everyone?",
    "你怎么现在才告诉我？",
    "没事，我自己一个人也可以的。",
    "太好了，我们终于成功了！",
)

REASONINGS = (
    "In the video, the woman's brows are drawn together and her lips are pressed tight before she speaks. She "
    "turns her head away twice and blinks several times, as if holding back tears. Her voice begins low and "
    "steady, but it breaks on the last words and becomes almost a whisper. The subtitle says that she is fine, "
    "which contradicts what the face and the voice show: she is hiding that she has been hurt. Taken together, "
    "the clip suggests sadness and disappointment rather than anger.",
    "The man opens his eyes wide, raises both brows and leans towards the other person. His mouth falls open for "
    "a moment and then spreads into a broad smile. He speaks fast, at a high pitch and with a laugh in the middle"
    " of the sentence. The subtitle is a question, but its tone does not doubt anything; it shows that he did not"
    " expect the gift and is glad about it. He is surprised, happy and grateful.",
    "Her face is tense and her jaw is set. She speaks loudly, with a hard stress on the first word of each "
    "sentence, and points at someone outside the frame. The words accuse the listener of having done something in"
    " public that should have stayed private. There is some shame in the lowered gaze at the end, but anger "
    "prevails.",
)
