"""Words that the source `slots` fills in beside those of `intents`: longer lists, a fifth of each for the test alone.

By language and list, values between bars; `name KIND` holds names of that kind of device.
"""

from __future__ import annotations

MORE_WORDS: dict[str, dict[str, str]] = {
    "en": {
        "area": "laundry room|guest room|study|den|pantry|hall|porch|balcony|terrace|cellar|utility room|playroom|"
        "library|gym|master bedroom|guest bathroom|conservatory|sunroom|entrance|loft|workshop|shed|music room|lobby",
        "message": "the pizza has arrived|grandma is on the phone|your bath is ready|please tidy your rooms|"
        "the bus leaves at eight|somebody is at the door|breakfast is served|it starts to rain|homework first|"
        "the show begins soon",
        "search_query": "classical music|taylor swift|the morning show|yellow submarine|smooth rock|a podcast on space|"
        "the lion king|country songs|miles davis|rain sounds",
        "timer_name": "rice|dryer|nap|potatoes|meditation|chicken|sauna|reading|soup|oven",
        "timer_command": "open the blinds|turn on the fan|pause the music|close the curtains|unlock the back door|"
        "turn off the heater|start the dishwasher|dim the lamp",
        "shopping_list_item": "sugar|flour|bananas|yogurt|salmon|potatoes|onions|shampoo|batteries|orange juice|"
        "olive oil|salt|paper towels|honey",
        "todo_list_item": "book a flight|feed the cat|mow the lawn|fix the sink|return the books|buy a present|"
        "vacuum the stairs|renew the passport|sort the mail|see the dentist",
        "name": "kettle|toaster|fridge|freezer|microwave|printer|aquarium pump|dehumidifier|doorbell|router|dryer|"
        "projector|electric blanket|water heater",
        "name light": "hall light|chandelier|string lights|spotlight|wall lamp|garden lights|table lamp|mirror light|"
        "shelf lights|vanity light",
        "name lock": "gate|basement door|patio door|shed door|cellar door|office door",
        "name cover": "bathroom blind|office shutter|skylight|living room curtain|right blind|sun shade",
        "name fan": "box fan|attic fan|wall fan|bathroom fan|table fan",
        "name climate": "heat pump|floor heating|boiler|fireplace|towel warmer",
        "name media_player": "record player|office speaker|projector|radio|home cinema|bathroom speaker",
        "name todo": "errands|garden|school|party|travel",
        "name vacuum": "floor cleaner|mop robot|sweeper",
        "name lawn_mower": "grass robot|hedge robot|mower",
        "name weather": "madrid|rome|sydney|chicago|oslo",
        "name person": "peter|laura|tom|sarah|james",
        "name scene": "dinner|reading|sunset|focus|romance",
        "name script": "vacation mode|wake up routine|leaving home|cleaning routine",
        "name valve": "main valve|pool valve|drip line",
    },
    "zh-CN": {
        "area": "主卧|次卧|客房|阳台|露台|玄关|储藏室|衣帽间|洗手间|卫生间|游戏室|健身室|门厅|工作室|院子|婴儿房|"
        "茶室|洗衣房|酒窖|影音室|琴房|楼梯间|办公室|佛堂",
        "message": "披萨到了|奶奶来电话了|洗澡水放好了|把房间收拾一下|校车八点开|有人敲门|早饭好了|下雨了|先写作业|"
        "节目马上开始",
        "search_query": "古典音乐|邓丽君的歌|早间新闻|摇滚乐|狮子王|雨声|民谣|京剧|世界杯|评书",
        "timer_name": "米饭|烘干|午睡|土豆|冥想|鸡汤|桑拿|阅读|蒸鱼|烤箱",
        "timer_command": "打开窗帘|打开风扇|暂停音乐|拉上窗帘|打开后门|关掉暖气|启动洗碗机|调暗台灯",
        "shopping_list_item": "白糖|面粉|香蕉|酸奶|三文鱼|土豆|洋葱|洗发水|电池|橙汁|橄榄油|盐|纸巾|蜂蜜",
        "todo_list_item": "订机票|喂猫|修水管|还书|买礼物|拖地|换护照|看牙医|整理邮件|倒垃圾",
        "name": "电水壶|面包机|冰箱|冰柜|微波炉|打印机|鱼缸水泵|除湿机|门铃|路由器|烘干机|投影仪|电热毯|热水器",
        "name light": "走廊灯|水晶灯|彩灯|射灯|壁灯|花园灯|镜前灯|灯带|地灯|橱柜灯",
        "name lock": "大门|地下室门|阳台门|铁门|书房门|入户门",
        "name cover": "浴室窗帘|书房百叶|天窗|客厅窗帘|纱帘|遮光帘",
        "name fan": "塔扇|壁扇|换气扇|循环扇|桌面风扇",
        "name climate": "热泵|地暖|锅炉|壁炉|新风机",
        "name media_player": "唱片机|投影仪|家庭影院|智能音箱|录音机",
        "name todo": "杂事|花园|学习|聚餐|旅行",
        "name vacuum": "拖地机|擦地机器人|清洁机",
        "name lawn_mower": "割草机|草坪|庭院",
        "name weather": "马德里|罗马|悉尼|杭州|成都",
        "name person": "小刚|小丽|刘洋|陈静|赵敏",
        "name scene": "晚餐|阅读|日落|专注|浪漫",
        "name script": "度假模式|起床流程|离家模式|打扫流程",
        "name valve": "总阀|泳池阀|滴灌",
    },
}
