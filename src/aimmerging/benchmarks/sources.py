"""Where the rows of each benchmark task come from: facts as data, no text of any row.

Hub datasets are pinned to a commit. Prompts follow the wording of O-LoRA without its "Task: … Dataset: …" prefix, which
tells the model which task it sees; label words are those of O-LoRA and of the AIMMerging release alike.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HubTask:
    """A classification task built from a dataset on the Hugging Face hub.

    Attributes:
        dataset: hub id.
        config: configuration of the dataset, or None.
        revision: commit; a branch name where no commit was known to us (the manifest has the commit it stood for).
        test: labelled split that serves as test; the official test labels of GLUE and SuperGLUE are not public.
        label: column of the class index.
        words: answer of each class, by class index.
        options: the answers as the prompt lists them.
        instruction: first sentence of the prompt.
        body: the rest; names in braces are columns.
        licence: of the rows.
        first_class: class index of words[0].
        without: a column, and the body for rows in which that column is empty.
    """

    dataset: str
    config: str | None
    revision: str
    test: str
    label: str
    words: tuple[str, ...]
    options: tuple[str, ...]
    instruction: str
    body: str
    licence: str
    first_class: int = 0
    without: tuple[str, str] | None = None

    def prompt(self, record: dict[str, object]) -> str:
        """Return the prompt for one row of the dataset; missing texts (null) are empty."""
        texts = {column: "" if value is None else value for column, value in record.items()}
        opening = f"{self.instruction} Choose one from the option. Option: {', '.join(self.options)}.".lstrip()
        body = self.without[1] if self.without and not texts[self.without[0]] else self.body
        return f"{opening}\n{body.format_map(texts)}\nAnswer:"


_GLUE = ("nyu-mll/glue", "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c")
_SUPERGLUE = ("aps/super_glue", "3de24cf8022e94f4ee4b9d55a6f539891524d646")

_RELATION = 'What is the logical relationship between the "sentence 1" and the "sentence 2"?'
_SENTIMENT = "What is the sentiment of the following paragraph?"
_TOPIC = "What is the topic of the following paragraph?"

_STARS = ("very negative", "negative", "neutral", "positive", "very positive")
_GOOD = ("Good", "Bad")
_TRUE = ("True", "False")
_FALSE = ("False", "True")
_NEWS = ("World", "Sports", "Business", "Science or Technology")
_ONTOLOGY = (
    "Company", "Educational Institution", "Artist", "Athlete", "Office Holder", "Mean of Transportation", "Building",
    "Natural Place", "Village", "Animal", "Plant", "Album", "Film", "Written Work",
)  # fmt: skip
_SUBJECTS = (
    "Society & Culture", "Science & Mathematics", "Health", "Education & Reference", "Computers & Internet", "Sports",
    "Business & Finance", "Entertainment & Music", "Family & Relationships", "Politics & Government",
)  # fmt: skip

HUB_TASKS = {
    "agnews": HubTask(
        # the hub has headline and text in one column, so that there is no "Title:" line as in the released rows
        "fancyzhx/ag_news", None, "eb185aade064a813bc0b7f42de02595523103ca4", "test", "label", _NEWS, _NEWS, _TOPIC,
        "Text: {text}\n", "unclear; research, non-commercial wording: do not redistribute",
    ),
    "amazon": HubTask(
        # no maintained copy of the original exists on the hub; this one keeps its three columns, classes 1 to 5
        "yassiracharki/Amazon_Reviews_for_Sentiment_Analysis_fine_grained_5_classes", None, "main", "test",
        "class_index", _STARS, _STARS, _SENTIMENT, "Title: {review_title}\nText: {review_text}\n",
        "Amazon terms: do not redistribute", first_class=1,
    ),
    "boolqa": HubTask(
        _SUPERGLUE[0], "boolq", _SUPERGLUE[1], "validation", "label", _FALSE, _TRUE,
        "According to the following passage, is the question true or false?",
        "question: {question}\npassage: {passage}", "CC BY-SA 3.0",
    ),
    "cb": HubTask(
        _SUPERGLUE[0], "cb", _SUPERGLUE[1], "validation", "label", ("entailment", "contradiction", "neutral"),
        ("entailment", "contradiction", "neutral"), _RELATION, "sentence 1: {premise}\nsentence 2: {hypothesis}",
        "research use",
    ),
    "copa": HubTask(
        # the released code gives COPA the instruction of BoolQ; ours has none, as in O-LoRA
        _SUPERGLUE[0], "copa", _SUPERGLUE[1], "validation", "label", ("A", "B"), ("A", "B"), "",
        'Which sentence is the {question} of "{premise}"? Choose one between A and B.\nA: {choice1}\nB: {choice2}',
        "BSD 2-Clause",
    ),
    "dbpedia": HubTask(
        "fancyzhx/dbpedia_14", None, "9abd46cf7fc8b4c64290f26993c540b92aa145ac", "test", "label", _ONTOLOGY, _ONTOLOGY,
        _TOPIC, "Title: {title}\nText: {content}\n", "CC BY-SA 3.0",
    ),
    "imdb": HubTask(
        "stanfordnlp/imdb", None, "e6281661ce1c48d982bc483cf8a173c1bbeb5d31", "test", "label", ("Bad", "Good"), _GOOD,
        _SENTIMENT, "{text}", "none given: do not redistribute",
    ),
    "mnli": HubTask(
        _GLUE[0], "mnli", _GLUE[1], "validation_matched", "label", ("entailment", "neutral", "contradiction"),
        ("neutral", "entailment", "contradiction"), _RELATION, "sentence 1: {premise}\nsentence 2: {hypothesis}",
        "mixed: OANC, CC BY and others",
    ),
    "multirc": HubTask(
        _SUPERGLUE[0], "multirc", _SUPERGLUE[1], "validation", "label", _FALSE, _FALSE,
        "According to the following passage and question, is the candidate answer true or false?",
        "paragraph: {paragraph}\nquestion: {question}\ncandidate answer: {answer}", "research use",
    ),
    "qqp": HubTask(
        _GLUE[0], "qqp", _GLUE[1], "validation", "label", _FALSE, _FALSE,
        'Whether the "first sentence" and the "second sentence" have the same meaning?',
        "first sentence: {question1}\nsecond sentence: {question2}", "Quora terms, non-commercial",
    ),
    "rte": HubTask(
        _GLUE[0], "rte", _GLUE[1], "validation", "label", ("entailment", "contradiction"),
        ("contradiction", "entailment"), _RELATION, "sentence 1: {sentence1}\nsentence 2: {sentence2}",
        "none given: do not redistribute",
    ),
    "sst-2": HubTask(
        _GLUE[0], "sst2", _GLUE[1], "validation", "label", ("Bad", "Good"), _GOOD, _SENTIMENT, "Text: {sentence}",
        "none given: do not redistribute",
    ),
    "wic": HubTask(
        _SUPERGLUE[0], "wic", _SUPERGLUE[1], "validation", "label", _FALSE, _TRUE,
        "Given a word and two sentences, whether the word is used with the same sense in both sentence?",
        "word: {word}\n{sentence1}\n{sentence2}", "CC BY-NC 4.0",
    ),
    "yahoo": HubTask(
        "community-datasets/yahoo_answers_topics", None, "6652a1e7c94f7260a0bfd0c9092dd48e2d536ea1", "test", "topic",
        _SUBJECTS, _SUBJECTS, _TOPIC,
        "Title: {question_title}\nQuestion: {question_content}\nAnswer: {best_answer}\n",
        "Yahoo Webscope research terms: do not redistribute",
        without=("question_content", "Question: {question_title}\nAnswer: {best_answer}\n"),
    ),
    "yelp": HubTask(
        "Yelp/yelp_review_full", None, "c1f9ee939b7d05667af864ee1cb066393154bf85", "test", "label", _STARS, _STARS,
        _SENTIMENT, "Text: {text}\n", "Yelp dataset agreement: academic use, do not redistribute",
    ),
}  # fmt: skip
"""The tasks of standard_cl and long_sequence."""


@dataclass(frozen=True, slots=True)
class NaturalTask:
    """A task of Super-NaturalInstructions.

    Attributes:
        file: name of its file in allenai/natural-instructions, without ending.
        licence: of its instances, as its file records.
        words: the labels of a classification task, whose metric is exact match; the others have ROUGE-L.
    """

    file: str
    licence: str
    words: tuple[str, ...] = ()


NATURAL_REVISION = "master"
NATURAL_URL = f"https://raw.githubusercontent.com/allenai/natural-instructions/{NATURAL_REVISION}/tasks/{{file}}.json"
NATURAL_PROMPT = "[INS] {definition}\n [IN] {input}\n [OUT] "

NATURAL_TASKS = {
    "task002": NaturalTask("task002_quoref_answer_generation", "CC BY 4.0"),
    "task073": NaturalTask("task073_commonsenseqa_answer_generation", "unknown"),
    "task1290": NaturalTask("task1290_xsum_summarization", "MIT"),
    "task1510": NaturalTask("task1510_evalution_relation_extraction", "unknown"),
    "task1572": NaturalTask("task1572_samsum_summary", "CC BY-NC-ND 4.0"),
    "task1590": NaturalTask("task1590_diplomacy_text_generation", "CC BY 4.0"),
    "task1687": NaturalTask("task1687_sentiment140_classification", "none given", ("positive", "negative")),
    "task1729": NaturalTask("task1729_personachat_generate_next", "CC BY 4.0"),
    "task181": NaturalTask("task181_outcome_extraction", "unknown"),
    "task363": NaturalTask("task363_sst2_polarity_classification", "none given", ("POS", "NEG")),
    "task511": NaturalTask("task511_reddit_tifu_long_text_summarization", "MIT"),
    "task591": NaturalTask("task591_sciq_answer_generation", "CC BY-NC 3.0"),
    "task639": NaturalTask("task639_multi_woz_user_utterance_generation", "Apache-2.0"),
    "task748": NaturalTask("task748_glucose_reverse_cause_event_detection", "CC BY-NC 4.0"),
    "task875": NaturalTask(
        "task875_emotion_classification", "none given", ("joy", "love", "anger", "fear", "surprise", "sadness")
    ),
}

TRACE_METRICS = {
    "C-STANCE": "exact_match",
    "FOMC": "exact_match",
    "MeetingBank": "rouge_l",
    "NumGLUE-cm": "exact_match",
    "NumGLUE-ds": "exact_match",
}
TRACE_LEFT_OUT = {
    "Py150": "its metric, fuzzy edit similarity, is not one of ours",
    "ScienceQA": "its score is taken from the letter of an answer with an explanation, which no metric of ours does",
    "20Minuten": "its metric, SARI, is not one of ours",
}
"""Tasks of TRACE that cannot be scored as TRACE scores them, and why."""

TRACE_LICENCE = "varies by task, several non-commercial: see the sources named by the authors of TRACE"
TRACE_HOME = "https://github.com/BeyonderXX/TRACE"

_REPORTED = {
    **dict.fromkeys(("rte", "cb", "copa"), "dev and test overlap fully"),
    **dict.fromkeys(("sst-2", "wic"), "dev lies inside test"),
    **dict.fromkeys(NATURAL_TASKS, "dev and test are the same file"),
}
_REPORTED_ELSEWHERE = "12 to 34 % of dev is in test"


def reported_overlap(task: str) -> str:
    """Return what is known of the files that the AIMMerging code released; not counted by us where test is absent."""
    return _REPORTED.get(task, _REPORTED_ELSEWHERE)


def metric_of(benchmark: str, task: str) -> str:
    """Return the metric of a task, one of :data:`aimmerging.core.metrics.METRICS`."""
    if benchmark == "trace":
        return TRACE_METRICS[task]
    return "exact_match" if benchmark != "superni" or NATURAL_TASKS[task].words else "rouge_l"


def licence_of(benchmark: str, task: str) -> str:
    """Return the licence of a task's rows."""
    if benchmark == "trace":
        return TRACE_LICENCE
    return NATURAL_TASKS[task].licence if benchmark == "superni" else HUB_TASKS[task].licence
