"""What people ask of a smart home, by intent: sentences drawn from the templates of Home Assistant.

The package (home-assistant-intents) holds for each language the templates of each intent, with lists of values and
rules. The names of rooms, floors and devices it leaves to each home, and some values to the speaker; those are filled
here from short lists of common words, so a language needs such a list: English and simplified Chinese have one.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

from moekit.config.errors import DataError, require
from moekit.data.clients import Package
from moekit.data.examples import Examples, TaskData
from moekit.data.task_sources.base import Fetcher, register_source
from moekit.data.task_sources.own_split import info_of, own_split, without_doubles
from moekit.data.task_sources.templates import Draw, sample_sentences

INTENTS = Package(
    client="pip-wheel",
    name="home-assistant-intents",
    version="2026.10.27",
    digest="sha256:256eb1e4fc6e6f4943d0ba4e089c9639d74d0e9d62ccddeb7148bc168de55e40",
    members=(
        "home_assistant_intents/data/en.json",
        "home_assistant_intents/data/zh-CN.json",
        "home_assistant_intents/intents.json",
        "*/licenses/LICENSE.md",
    ),
)
_FEWEST_TEMPLATES = 5

# by language: the values that the package leaves open; `name` by the domain of the device, "" for any other
WORDS: dict[str, dict[str, str]] = {
    "en": {
        "area": "kitchen|living room|bedroom|bathroom|office|garage|hallway|dining room|nursery|basement|attic|garden",
        "floor": "ground floor|first floor|second floor|third floor|top floor|upstairs|downstairs",
        "zone": "work|school|the gym|the office|the airport|downtown",
        "message": "dinner is ready|it is time for bed|the taxi is here|we are leaving in ten minutes|come downstairs",
        "search_query": "jazz|the beatles|piano music|the evening news|abbey road|bohemian rhapsody|star wars",
        "timer_name": "pizza|pasta|laundry|tea|egg|homework|workout|bread|break|cake",
        "timer_command": "turn off the lights|open the garage door|start the vacuum|lock the front door|play jazz",
        "shopping_list_item": "milk|bread|eggs|apples|coffee|cheese|rice|tomatoes|toothpaste|butter|dog food",
        "todo_list_item": "call mom|water the plants|pay the rent|wash the car|clean the windows|send the letter",
        "name": "ceiling fan|coffee machine|humidifier|tv|dishwasher|heater|air purifier|washing machine|oven",
        "name light": "bedside lamp|ceiling light|desk lamp|porch light|floor lamp|night light|reading lamp",
        "name lock": "front door|back door|garage door|side gate",
        "name cover": "left blind|bedroom curtain|garage door|kitchen shade|patio awning|roller shutter",
        "name fan": "ceiling fan|desk fan|tower fan|extractor fan",
        "name climate": "thermostat|heater|air conditioner|radiator",
        "name media_player": "tv|kitchen speaker|stereo|bedroom radio|soundbar",
        "name todo": "chores|groceries|work|weekend|holiday",
        "name vacuum": "robot vacuum|vacuum cleaner|dusty",
        "name lawn_mower": "robot mower|lawn mower",
        "name weather": "london|paris|new york|tokyo|berlin",
        "name person": "alice|bob|anna|david|maria",
        "name scene": "party|movie night|good morning|bedtime",
        "name script": "bedtime routine|party mode|morning routine",
        "name valve": "water valve|garden valve|sprinkler",
    },
    "zh-CN": {
        "area": "厨房|客厅|卧室|浴室|书房|车库|走廊|餐厅|儿童房|地下室|阁楼|花园",
        "floor": "一|二|三|四|顶",
        "zone": "公司|学校|健身房|机场|超市",
        "message": "晚饭做好了|该睡觉了|出租车到了|十分钟后出发|快下楼",
        "search_query": "爵士乐|周杰伦的歌|钢琴曲|晚间新闻|相声",
        "timer_name": "披萨|面条|洗衣|泡茶|鸡蛋|作业|锻炼|面包|休息",
        "timer_command": "关灯|打开车库门|启动扫地机|锁上前门|播放音乐",
        "shopping_list_item": "牛奶|面包|鸡蛋|苹果|咖啡|奶酪|大米|西红柿|牙膏|黄油",
        "todo_list_item": "给妈妈打电话|浇花|交房租|洗车|擦窗户|寄信",
        "name": "咖啡机|加湿器|电视|洗碗机|取暖器|空气净化器|洗衣机|烤箱|插座",
        "name light": "床头灯|吸顶灯|台灯|门廊灯|落地灯|夜灯",
        "name lock": "前门|后门|车库门|侧门",
        "name cover": "卧室窗帘|车库门|百叶窗|遮阳棚|卷帘",
        "name fan": "吊扇|台扇|落地扇|排气扇",
        "name climate": "空调|暖气|温控器|取暖器",
        "name media_player": "电视|音箱|收音机|音响",
        "name todo": "家务|工作|周末|假期",
        "name vacuum": "扫地机|吸尘器|扫地机器人",
        "name lawn_mower": "前院|后院",
        "name weather": "北京|上海|伦敦|东京|广州",
        "name person": "小明|小红|王芳|张伟|李娜",
        "name scene": "聚会|观影|早安|睡前",
        "name script": "睡前流程|聚会模式|早晨流程",
        "name valve": "水阀|花园阀门|洒水器",
    },
}


@register_source(
    "intents",
    "about 8,000 requests to a smart home under some 40 intents, drawn from templates; English or Chinese",
    columns={
        "text": "the request",
        "label": "the intent",
        "domain": "light, climate, media_player, vacuum, ...; homeassistant for what fits any device",
        "template": "the template, as intent/number; of rare ones, the request",
    },
    licence="Apache-2.0",
)
def intents(fetch: Fetcher, language: Literal["en", "zh-CN"] = "en", per_template: int = 10) -> TaskData:
    """Requests and their intents.

    Args:
        language: "en" or "zh-CN".
        per_template: how many sentences are drawn of each template, at most.
    """
    require(language in WORDS, "data.options.language", language, f"must be one of {', '.join(WORDS)}")
    require(1 <= per_template <= 1000, "data.options.per_template", per_template, "must be 1 to 1000")
    package = fetch(INTENTS)
    known = json.loads(package.read_text("home_assistant_intents/intents.json"))
    described = json.loads(package.read_text(f"home_assistant_intents/data/{language}.json"))
    domains = {intent: str(entry.get("domain", "homeassistant")) for intent, entry in known.items()}
    examples = requests(described, domains, WORDS[language], per_template)
    drawn = len(examples)
    examples, left_out = without_doubles(examples)
    data, note = own_split(examples, by="label", together="template")
    notes = [
        f"{drawn} sentences of {sum(map(len, _templates(described).values()))} templates, at most {per_template} each, "
        "rooms and names filled from short lists",
        left_out,
        note,
        f"intents of fewer than {_FEWEST_TEMPLATES} templates are split by sentence instead",
        f"{len(Counter(examples['label']))} intents",
    ]
    origin = f"PyPI; sentence templates of Home Assistant, {language}"
    return replace(data, sources=[info_of(INTENTS, origin, "Apache-2.0", "; ".join(notes))])


def requests(
    described: Mapping[str, Any], domains: Mapping[str, str], words: Mapping[str, str], per_template: int
) -> Examples:
    """Sentences of all templates of a language.

    Args:
        described: the package's description of the language: intents, lists, expansion_rules.
        domains: of each intent.
        words: for each list that the package leaves open, its values between bars; `name DOMAIN` for names of devices.

    >>> described = {"intents": {"Stop": {"data": [{"sentences": ["stop [it]"]}]}}, "lists": {}, "expansion_rules": {}}
    >>> requests(described, {"Stop": "timer"}, {}, 4).columns["text"]
    ['stop', 'stop it']
    """
    rules = {str(name): str(template) for name, template in described["expansion_rules"].items()}
    lists = {name: _values(name, entry, words) for name, entry in described["lists"].items()}
    lists |= {
        name: _one_of(f"({words[name]})") for name in ("area", "floor") if name in words and name not in lists
    }
    columns: dict[str, list[str]] = {"text": [], "label": [], "domain": [], "template": []}
    for intent, templates in _templates(described).items():
        for number, (template, device) in enumerate(templates):
            names = (
                words.get(f"name {device}") or words.get(f"name {domains.get(intent)}") or words.get("name")
            )
            own = {**lists, "name": _one_of(f"({names})")} if names else lists
            for sentence in sample_sentences(template, per_template, own, rules):
                columns["text"].append(sentence)
                columns["label"].append(intent)
                columns["domain"].append(domains.get(intent, "homeassistant"))
                columns["template"].append(
                    f"{intent}/{number}" if len(templates) >= _FEWEST_TEMPLATES else f"{intent}: {sentence}"
                )
    return Examples(columns)


def _templates(described: Mapping[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """Of each intent, its templates, each with the domain of the device that it asks for, empty where any will do."""
    found: dict[str, list[tuple[str, str]]] = {}
    for intent, entry in described["intents"].items():
        for block in entry["data"]:
            device = {**block.get("requires_context", {}), **block.get("slots", {})}.get("domain", "")
            device = device[0] if isinstance(device, list) and device else device
            found.setdefault(str(intent), []).extend(
                (str(template), str(device)) for template in block["sentences"]
            )
    return found


def _one_of(template: str) -> Callable[[Draw], str]:
    return lambda draw: template


def _values(name: str, entry: Mapping[str, Any], words: Mapping[str, str]) -> Callable[[Draw], str]:
    """What draws a value of a list: one of its values, a number of its range, or one of our words."""
    if "values" in entry:
        values = [str(value["in"] if isinstance(value, Mapping) else value) for value in entry["values"]]
        return lambda draw: values[draw(len(values))]
    if "range" in entry:
        limits = entry["range"]
        numbers = range(int(limits["from"]), int(limits["to"]) + 1, int(limits.get("step", 1)))
        return lambda draw: str(numbers[draw(len(numbers))])
    if name in words:
        return _one_of(f"({words[name]})")
    raise DataError(f"the list {name!r} is open and there are no words to fill it with")
