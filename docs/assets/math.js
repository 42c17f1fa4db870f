// Formulas as MathML, which browsers draw themselves: no fonts and no style sheet are loaded.
document.addEventListener("DOMContentLoaded", () => {
  for (const element of document.querySelectorAll(".arithmatex")) {
    const text = element.textContent.trim();
    const displayMode = text.startsWith("\\[");
    katex.render(text.slice(2, -2), element, { displayMode, output: "mathml", throwOnError: false });
  }
});
