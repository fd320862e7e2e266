"""A report's page, parsed."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """A report's tags, the addresses in them, and its tables as rows of cell texts."""

    def __init__(self, path):
        super().__init__()
        self.text, self.tags, self.addresses, self.tables, self.bold = "", [], [], [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "srcset", "href", "action", "data")]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.best = ("class", "best") in attrs

    def handle_endtag(self, tag):
        if tag == "td" and self.best:
            self.bold.append(self.tables[-1][-1][-1])
        if tag == "table":
            self.tables.append([["outside"]])

    def handle_data(self, data):
        if self.lasttag != "style":
            self.text += data
        if self.tables and self.tables[-1] and self.tables[-1][-1]:
            self.tables[-1][-1][-1] += data.strip()
